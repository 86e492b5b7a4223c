import math

import pytest
import torch

from lqf_lightning.linear.training_time import extrapolated_times, first_passage, smoothed, training_times


def brute(curve, level, window):
    """The first step of which all later windows are at or below the level."""
    means = [sum(curve[t - window + 1 : t + 1]) / window if t >= window - 1 else math.inf for t in range(len(curve))]
    steps = [t for t in range(len(curve)) if all(mean <= level for mean in means[t:])]
    return steps[0] if steps else None


@pytest.mark.parametrize("window", [1, 3, 7])
@pytest.mark.parametrize("seed", range(5))
def test_the_passage_is_the_first_step_that_no_later_one_takes_back(window, seed):
    draw = torch.Generator().manual_seed(seed)
    t = torch.arange(40, dtype=torch.float64)
    curve = torch.exp(-t / 10) + 0.1 * torch.rand(40, generator=draw, dtype=torch.float64)
    for level in (2.0, 0.6, 0.3, 0.15, 0.01):
        assert first_passage(curve, level, window) == brute(curve.tolist(), level, window)


def test_a_curve_that_ends_above_or_diverges_has_no_passage():
    assert first_passage(torch.tensor([3.0, 1.0, 3.0]), 2.0) is None
    assert first_passage(torch.tensor([3.0, 1.0, math.nan]), 2.0) is None
    assert first_passage(torch.tensor([3.0, math.inf, 1.0, 1.0]), 2.0) == 2
    assert first_passage(torch.tensor([1.0]), 2.0) == 0
    assert first_passage(torch.tensor([1.0]), 2.0, window=2) is None


def test_windows_average_what_is_behind():
    assert smoothed(torch.tensor([6.0, 3.0, 0.0, 3.0]), 3)[2:].tolist() == [3.0, 2.0]


def test_fractions_count_from_where_the_curve_begins_or_from_what_is_given():
    curve = torch.tensor([8.0, 4.0, 2.0, 1.0])
    assert [time.steps for time in training_times(curve, [0.5, 0.2, 0.1])] == [1, 3, None]
    assert [time.steps for time in training_times(curve, [0.5, 0.2, 0.1], initial=16.0)] == [0, 2, 3]


@pytest.mark.parametrize("fractions", [[], [0.0], [1.0], [0.5, -0.1]])
def test_fractions_out_of_range_are_refused(fractions):
    with pytest.raises(ValueError, match=r"callbacks\.training_time\.thresholds"):
        training_times(torch.ones(3), fractions)


def spectrum_curve(count, steps=4000):
    """Power-law eigenvalues, of which n samples resolve the first n."""
    mode = torch.arange(1, count + 1, dtype=torch.float64)
    t = torch.arange(steps, dtype=torch.float64)
    return ((1 - 0.5 * mode[:, None] ** -1.5) ** (2 * t) * mode[:, None] ** -2.5).sum(0)


def test_a_subset_tells_early_times_and_bounds_late_ones():
    truth = spectrum_curve(800)
    fractions = (0.5, 0.1, 0.01, 0.0005)
    true = [time.steps for time in training_times(truth, fractions)]
    found = extrapolated_times(spectrum_curve(400), spectrum_curve(200), fractions)
    assert len({time.lower_bound for time in found}) == 2
    for time, steps in zip(found, true, strict=True):
        assert time.steps <= steps
        if not time.lower_bound:
            assert abs(time.steps - steps) <= max(1, 0.05 * steps)


def test_a_subset_that_does_not_get_there_says_that_it_takes_longer():
    (time,) = extrapolated_times(spectrum_curve(40, 50), spectrum_curve(20, 50), [0.001])
    assert (time.steps, time.lower_bound) == (None, True)


def test_agreement_is_judged_between_steps():
    t = torch.arange(30, dtype=torch.float64)
    near = extrapolated_times(0.8**t, 0.801**t, [0.5])[0]
    far = extrapolated_times(0.8**t, 0.78**t, [0.5])[0]
    assert near.steps == far.steps == 4
    assert (near.lower_bound, far.lower_bound) == (False, True)


def test_fractions_are_those_of_the_loss_before_training_where_batches_differ():
    """The first batch is an easy one: a tenth of its loss is not a tenth of the loss."""
    t = torch.arange(60, dtype=torch.float64)
    curve = 0.9**t
    batches = torch.cat([torch.tensor([0.5], dtype=torch.float64), curve[1:]])
    wanted = extrapolated_times(curve, curve, [0.1])[0]
    found = extrapolated_times(batches, batches, [0.1], initial=(1.0, 1.0))[0]
    assert (found.steps, found.lower_bound) == (wanted.steps, False)
    assert extrapolated_times(batches, batches, [0.1])[0].steps > wanted.steps
