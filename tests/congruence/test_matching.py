import pytest
import torch

from linear.dense_ridge import normal
from lqf_lightning.congruence.matching import match_targets, reference_targets


@pytest.fixture
def parts():
    label_target, reference, outputs = normal(7, 4), normal(7, 4, seed=1), normal(7, 4, seed=2)
    focus = torch.tensor([0.0, 1.0, 6.0, 6.0, 0.5, 0.0, 100.0], dtype=torch.float64)
    return label_target, reference, outputs, focus


def test_one_weighted_square_and_a_constant_are_the_two_squares(parts):
    label_target, reference, outputs, focus = parts
    both = match_targets(label_target, reference, focus)
    two = (outputs - label_target).square().sum(1) + focus * (outputs - reference).square().sum(1)
    one = both.weight * (outputs - both.target).square().sum(1) + 2 * both.constant
    assert torch.allclose(one, two, rtol=1e-12)


def test_gradients_are_those_of_the_two_squares(parts):
    label_target, reference, outputs, focus = parts
    both = match_targets(label_target, reference, focus)
    two = outputs - label_target + focus[:, None] * (outputs - reference)
    assert torch.allclose(both.weight[:, None] * (outputs - both.target), two, rtol=1e-12, atol=1e-12)


def test_samples_without_focus_keep_target_and_weight_to_the_bit(parts):
    label_target, reference, _, focus = parts
    both = match_targets(label_target, reference, focus)
    for sample in (0, 5):
        assert torch.equal(both.target[sample], label_target[sample])
        assert both.weight[sample] == 1
        assert both.constant[sample] == 0


def test_unknown_classes_match_the_target_of_the_label():
    label_target, scaled = normal(3, 4), normal(3, 2, seed=1)
    before = label_target.clone()
    matched = reference_targets(label_target, scaled, torch.tensor([3, 1]))
    assert torch.equal(matched[:, [3, 1]], scaled)
    assert torch.equal(matched[:, [0, 2]], label_target[:, [0, 2]])
    assert torch.equal(label_target, before)


@pytest.mark.parametrize("shape", [(7, 1), (6,), (1,), ()])
def test_one_number_per_sample_is_wanted(shape, parts):
    label_target, reference, _, _ = parts
    with pytest.raises(ValueError, match=r"one number per sample \(n,\); got \(7, 4\), \(7, 4\) and"):
        match_targets(label_target, reference, torch.ones(shape, dtype=torch.float64))


def test_other_shapes_are_told(parts):
    label_target, reference, _, focus = parts
    with pytest.raises(ValueError, match=r"got \(7, 4\), \(7, 3\) and \(7,\)"):
        match_targets(label_target, reference[:, :3], focus)
    with pytest.raises(ValueError, match=r"expected outputs \(7, 2\), got \(7, 4\)"):
        reference_targets(label_target, reference, torch.tensor([0, 1]))
