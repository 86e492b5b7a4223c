import math

import pytest
import torch

from lqf_lightning.information.sample_outcomes import OUTCOMES, sample_outcomes


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_every_sample_is_judged_by_itself(dtype):
    logits = (3 * torch.randn(17, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)).to(dtype)
    target = torch.arange(17) % 4
    found = sample_outcomes(logits.clone().requires_grad_(), target)
    assert set(found) == set(OUTCOMES)
    assert not any(values.requires_grad for values in found.values())
    for i, (row, y) in enumerate(zip(logits.double().tolist(), target.tolist(), strict=True)):
        exponentials = [math.exp(value) for value in row]
        p = [value / sum(exponentials) for value in exponentials]
        wanted = {
            "loss": -math.log(p[y]), "correct": float(row.index(max(row)) == y), "confidence": p[y],
            "top_confidence": max(p), "margin": row[y] - max(v for c, v in enumerate(row) if c != y),
        }  # fmt: skip
        assert {name: float(found[name][i]) for name in OUTCOMES} == pytest.approx(wanted, rel=1e-5, abs=1e-6)
    assert 0 < found["correct"].mean() < 1


def test_losses_of_sure_mistakes_are_finite():
    found = sample_outcomes(torch.tensor([[200.0, 0.0]]), torch.tensor([1]))
    assert found["loss"].item() == 200
    assert found["margin"].item() == -200


def test_a_batch_may_be_empty():
    found = sample_outcomes(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))
    assert [len(values) for values in found.values()] == [0] * len(OUTCOMES)
