import math
from itertools import combinations

import pytest
import torch

from lqf_lightning.information.memorization import (
    influence,
    memorization,
    refuse_threshold,
    worst_standard_error,
)


def mean(values):
    return sum(values) / len(values) if values else math.nan


def variance_of_mean(values):
    """Unbiased."""
    if len(values) < 2:
        return math.nan
    return sum((v - mean(values)) ** 2 for v in values) / (len(values) - 1) / len(values)


def by_hand(mask, answer):
    """Of one training sample and the answers on one sample: difference, standard error, mean without."""
    inside = [a for m, a in zip(mask.tolist(), answer.tolist(), strict=True) if m]
    outside = [a for m, a in zip(mask.tolist(), answer.tolist(), strict=True) if not m]
    return mean(inside) - mean(outside), (variance_of_mean(inside) + variance_of_mean(outside)) ** 0.5, mean(outside)


def draw(binary):
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(25, 12, generator=generator) < 0.7
    mask[:, 0], mask[:, 1] = True, False  # one in all runs, one in none
    mask[:, 2] = torch.arange(25) < 1  # in a single one
    answers = [torch.rand(25, size, generator=generator, dtype=torch.float64) for size in (12, 7)]
    return mask, *[(answer < 0.6) if binary else answer for answer in answers]


@pytest.mark.parametrize("binary", [True, False])
def test_runs_with_and_without_a_sample_are_compared(binary):
    mask, correct, _ = draw(binary)
    found = memorization(mask, correct)
    assert found.runs_in.tolist() == mask.sum(0).tolist()
    assert (found.runs_in + found.runs_out).tolist() == [25] * 12
    for i in range(12):
        got = found.memorization[i].item(), found.standard_error[i].item(), found.c_score[i].item()
        assert got == pytest.approx(by_hand(mask[:, i], correct[:, i].double()), rel=1e-9, abs=1e-9, nan_ok=True)
    assert found.memorization[:3].isnan().tolist() == [True, True, False]
    assert torch.allclose((found.seen - found.c_score)[2:], found.memorization[2:])
    limit = 0.5 * (1 / mask.sum(0)[3:] + 1 / (~mask).sum(0)[3:]).sqrt()
    assert torch.allclose(found.worst_standard_error[3:], limit.double())


@pytest.mark.parametrize(("binary", "block"), [(True, 256), (True, 3), (False, 1)])
def test_influence_does_the_same_for_other_samples_in_blocks(binary, block):
    mask, _, correct = draw(binary)
    blocks = list(influence(mask, correct, block))
    assert [part.rows.start for part in blocks] == list(range(0, 7, block))
    values, error = (torch.cat([getattr(part, name) for part in blocks]) for name in ("influence", "standard_error"))
    for j in range(7):
        for i in range(12):
            wanted = by_hand(mask[:, i], correct[:, j].double())[:2]
            assert (values[j, i].item(), error[j, i].item()) == pytest.approx(wanted, rel=1e-9, abs=1e-9, nan_ok=True)


def test_influence_of_a_sample_on_itself_is_its_memorization():
    mask, correct, _ = draw(True)
    (found,) = influence(mask, correct)
    expected = memorization(mask, correct)
    assert torch.allclose(found.influence.diagonal(), expected.memorization, equal_nan=True)
    assert torch.allclose(found.standard_error.diagonal(), expected.standard_error, equal_nan=True)


@pytest.mark.parametrize("seed", [0, 1])
def test_a_learner_that_recites_memorizes_the_minority_and_nothing_else(seed):
    """It says the label of what it has seen, and of anything else the class of the majority."""
    label = torch.tensor([0, 0, 1, 0, 2, 0, 0, 1, 0])
    mask = torch.rand(40, 9, generator=torch.Generator().manual_seed(seed)) < 0.7
    said = torch.where(mask, label, 0)
    found = memorization(mask, said == label)
    assert found.memorization.tolist() == (label != 0).double().tolist()
    assert found.c_score.tolist() == (label == 0).double().tolist()
    assert found.standard_error.tolist() == [0.0] * 9


def test_the_standard_error_is_that_of_the_estimate():
    """All ways to split ten runs: seven of known answers with a sample, three without."""
    answers = torch.tensor([1, 1, 0, 1, 0, 1, 0, 0, 1, 1, 0, 1, 1, 1, 0], dtype=torch.float64)
    inside, outside = answers[:9], answers[9:]
    draws = []
    for first in combinations(range(9), 4):
        for second in combinations(range(6), 3):
            mask = torch.tensor([True] * 4 + [False] * 3)[:, None]
            found = memorization(mask, torch.cat([inside[list(first)], outside[list(second)]])[:, None])
            draws.append((found.memorization.item(), found.standard_error.item() ** 2))
    # Drawing k of n without replacement: the mean of the unbiased variance estimates is that of the population.
    wanted = inside.var() / 4 + outside.var() / 3
    assert mean([square for _, square in draws]) == pytest.approx(wanted.item())
    assert mean([value for value, _ in draws]) == pytest.approx((inside.mean() - outside.mean()).item())


@pytest.mark.parametrize(("runs", "error"), [(20, 0.24), (50, 0.15), (200, 0.077), (500, 0.049), (2000, 0.024)])
def test_the_worst_noise_of_some_numbers_of_runs(runs, error):
    assert worst_standard_error(runs, 0.7) == pytest.approx(error, rel=0.03)
    mask = torch.arange(runs) < 0.7 * runs
    half = torch.arange(runs) % 2 == 0
    assert memorization(mask[:, None], half[:, None]).standard_error.item() == pytest.approx(
        worst_standard_error(runs, 0.7), rel=1.5 / (0.3 * runs)
    )


def test_thresholds_wait_for_enough_runs():
    refuse_threshold(200, 0.7, 0.25)
    with pytest.raises(ValueError, match=r"199 runs .* up to 0.08.* threshold of 0.25 .*data.subset_seed=range\(200\)"):
        refuse_threshold(199, 0.7, 0.25)


def test_arguments_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"masks are \(3, 2\) and answers \(3, 1\)"):
        memorization(torch.ones(3, 2), torch.ones(3, 1))
    with pytest.raises(ValueError, match="masks of 3 runs and answers of 2"):
        next(influence(torch.ones(3, 2), torch.ones(2, 2)))
    for runs, ratio in ((0, 0.5), (3, 1.0), (3, 0.0)):
        with pytest.raises(ValueError, match="at least 1 run and a ratio between 0 and 1"):
            worst_standard_error(runs, ratio)
