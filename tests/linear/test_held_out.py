import math

import pytest
import torch

from lqf_lightning.linear.held_out import held_out_accuracy, held_out_cross_entropy, held_out_press

DRAW = torch.Generator().manual_seed(0)
SCORES = torch.randn(2, 30, 4, generator=DRAW, dtype=torch.float64)
TARGET = 15 * torch.eye(4, dtype=torch.float64)[torch.randint(0, 4, (30,), generator=DRAW)]
SCORES += 0.1 * TARGET
WEIGHT = torch.randint(0, 4, (30,), generator=DRAW).double()


def test_the_temperature_is_the_best_one():
    value, temperature = held_out_cross_entropy(SCORES, TARGET, WEIGHT)
    labels = TARGET.argmax(1)
    for r in range(2):

        def loss(t: torch.Tensor, row: int = r) -> torch.Tensor:
            each = torch.nn.functional.cross_entropy(SCORES[row] / t, labels, reduction="none")
            return (WEIGHT * each).sum() / WEIGHT.sum()

        best = temperature[r].clone().requires_grad_()
        found = loss(best)
        found.backward()
        assert float(value[r]) == pytest.approx(found.item(), rel=1e-12)
        assert abs(float(best.grad)) < 1e-9
        assert all(float(loss(factor * temperature[r])) > found.item() for factor in (0.8, 1.25))


def test_predictions_that_mislead_are_flattened_to_guessing():
    value, temperature = held_out_cross_entropy(-TARGET, TARGET)
    assert float(value) == pytest.approx(math.log(4), rel=1e-12)
    assert float(temperature) == math.inf


def test_perfect_predictions_reach_zero_whatever_their_scale():
    for scale in (1e-6, 1.0, 1e6):
        value, temperature = held_out_cross_entropy(scale * TARGET, TARGET)
        assert float(value) < 1e-12
        assert 0 < float(temperature) < scale * 15


def test_weights_count_as_repetitions():
    repeated = torch.arange(30).repeat_interleave(WEIGHT.long())
    for function in (held_out_accuracy, held_out_press):
        weighted, plain = function(SCORES, TARGET, WEIGHT), function(SCORES[:, repeated], TARGET[repeated])
        assert torch.allclose(weighted, plain, rtol=1e-12)
    weighted, plain = (
        held_out_cross_entropy(SCORES, TARGET, WEIGHT),
        held_out_cross_entropy(SCORES[:, repeated], TARGET[repeated]),
    )
    assert torch.allclose(weighted[0], plain[0], rtol=1e-12)


def test_a_single_output_has_no_classes():
    for function in (held_out_accuracy, held_out_cross_entropy):
        with pytest.raises(ValueError, match="single output is not defined; choose by 'press'"):
            function(torch.zeros(3, 1), torch.zeros(3, 1))


def test_a_level_common_to_all_classes_changes_nothing():
    for plain, raised in zip(
        held_out_cross_entropy(SCORES, TARGET), held_out_cross_entropy(SCORES + 1e6, TARGET), strict=True
    ):
        assert torch.allclose(plain, raised, rtol=1e-6)
