import pytest
import torch
from torch import nn

from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, View

VIEW = View(2, 1.0, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
CLASSES = ("a", "b", "c")


def member(seed, classes=CLASSES, view=VIEW):
    torch.manual_seed(seed)
    return FrozenTeacher(nn.Sequential(nn.Flatten(), nn.Linear(12, len(classes))), classes, view, f"model {seed}")


def test_logits_are_averaged_not_probabilities():
    members, images = [member(0), member(1), member(2)], 5 * torch.randn(4, 3, 2, 2)
    answers = torch.stack([m(images) for m in members])
    outputs = EnsembleTeacher(members)(images)
    torch.testing.assert_close(outputs, answers.mean(0))
    assert not torch.allclose(outputs.softmax(1), answers.softmax(2).mean(0), atol=1e-3)


def test_an_ensemble_of_one_is_its_member():
    single, images = member(0), torch.randn(4, 3, 2, 2)
    assert torch.equal(EnsembleTeacher([single])(images), single(images))


def test_the_order_of_members_does_not_matter():
    members, images = [member(seed) for seed in range(4)], torch.randn(4, 3, 2, 2)
    first, second = EnsembleTeacher(members), EnsembleTeacher(members[::-1])
    assert torch.equal(first(images), second(images))
    assert first.fingerprint == second.fingerprint != EnsembleTeacher(members[:3]).fingerprint


def test_outputs_are_aligned_by_class_name():
    images = torch.randn(4, 3, 2, 2)
    first, other = member(0), member(1, ("c", "a", "b"))
    outputs = EnsembleTeacher([first, other])(images)
    torch.testing.assert_close(outputs, (first(images) + other(images)[:, [1, 2, 0]]) / 2)


def test_members_see_images_each_in_its_own_normalization():
    images = torch.randn(4, 3, 2, 2)
    shifted = member(1, view=View(2, 1.0, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25)))
    outputs = EnsembleTeacher([member(0), shifted])(images)
    expected = (member(0)(images) + shifted((images - 0.5) / 0.25)) / 2
    torch.testing.assert_close(outputs, expected)


def test_it_stays_in_eval_mode():
    ensemble = EnsembleTeacher([member(0), member(1)]).train()
    assert not any(module.training for module in ensemble.modules())


def test_other_classes_and_no_members_are_refused():
    with pytest.raises(ValueError, match=r"model 0 and model 1 differ in \['c', 'd'\]"):
        EnsembleTeacher([member(0), member(1, ("a", "b", "d"))])
    with pytest.raises(ValueError, match="at least one member"):
        EnsembleTeacher([])
