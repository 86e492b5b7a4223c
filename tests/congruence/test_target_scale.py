import pytest
import torch
from torch.nn.functional import one_hot

from linear.dense_ridge import normal
from lqf_lightning.congruence.target_scale import TargetScale, fitted_scale, scale_sums

SCALE = 15.0
POSITION = torch.tensor([0, 2, 1, 1, -1, 2, 0, -1])


@pytest.fixture
def outputs():
    right = 3 * one_hot(POSITION.clamp(min=0), 3).double()
    return right + normal(8, 3) + normal(8, 1, seed=1)  # a shift of its own for every sample


def test_the_fit_is_that_of_least_squares_and_leaves_samples_of_unknown_classes_out(outputs):
    scale = fitted_scale(scale_sums(outputs, POSITION), SCALE, 3)
    known = POSITION >= 0
    centered = (outputs - outputs.mean(1, keepdim=True))[known]
    design = torch.stack([centered.flatten(), torch.ones(18, dtype=torch.float64)], 1)
    target = SCALE * one_hot(POSITION[known], 3).double()
    factor, level = torch.linalg.lstsq(design, target.flatten()).solution
    assert scale.factor == pytest.approx(float(factor), rel=1e-12)
    assert scale.level == pytest.approx(float(level), rel=1e-12)
    assert torch.allclose(scale(outputs[known]).flatten(), design @ torch.stack([factor, level]), rtol=1e-12)


def test_a_fitted_reference_is_no_longer_than_the_targets(outputs):
    known = POSITION >= 0
    scaled = fitted_scale(scale_sums(outputs, POSITION), SCALE, 3)(outputs[known])
    assert scaled.square().sum() <= SCALE**2 * known.sum()


def test_sums_of_parts_add_up(outputs):
    whole = scale_sums(outputs, POSITION)
    parts = scale_sums(outputs[:3], POSITION[:3]) + scale_sums(outputs[3:], POSITION[3:])
    assert torch.allclose(whole, parts, rtol=1e-13)
    assert scale_sums(outputs[:0], POSITION[:0]).tolist() == [0, 0]


def test_the_order_of_outputs_stays_and_shifts_play_no_part(outputs):
    scale = fitted_scale(scale_sums(outputs, POSITION), SCALE, 3)
    assert torch.equal(scale(outputs).argsort(1), outputs.argsort(1))
    shifted = outputs + torch.arange(8.0)[:, None]
    assert torch.allclose(scale(shifted), scale(outputs), rtol=1e-12, atol=1e-12)
    assert fitted_scale(scale_sums(shifted, POSITION), SCALE, 3).factor == pytest.approx(scale.factor, rel=1e-12)


def test_a_number_multiplies_and_nothing_else(outputs):
    assert torch.equal(TargetScale(1.0)(outputs), outputs)
    assert torch.equal(TargetScale(0.5)(outputs), 0.5 * outputs)


@pytest.mark.parametrize("sums", [[-1.0, 2.0], [0.0, 2.0], [0.0, 0.0], [float("nan"), 1.0]])
def test_a_reference_without_the_right_direction_is_refused(sums):
    with pytest.raises(ValueError, match=r"not larger for the right one\. Set method\.reference_scale=1\.0"):
        fitted_scale(torch.tensor(sums), SCALE, 3)


def test_one_position_per_sample_is_wanted(outputs):
    with pytest.raises(ValueError, match=r"one position per sample \(8,\), got \(8, 1\)"):
        scale_sums(outputs, POSITION[:, None])
