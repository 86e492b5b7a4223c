import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from lqf_lightning.teachers import FrozenTeacher, View

VIEW = View(6, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def net(classes=3):
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, classes))


def teacher(model=None, classes=("a", "b", "c")):
    return FrozenTeacher(model or net(), classes, VIEW, "old")


def test_it_answers_as_the_network_does_in_eval_mode():
    model, images = net(), torch.randn(5, 3, 6, 6)
    expected = copy.deepcopy(model).eval()(images)
    assert torch.equal(teacher(model)(images), expected)


def test_training_mode_of_its_owner_changes_neither_answers_nor_statistics():
    old, images = teacher(), torch.randn(5, 3, 6, 6)
    before, state = old(images), copy.deepcopy(old.state_dict())
    owner = nn.ModuleList([old]).train()
    assert torch.equal(owner[0](images), before)
    assert not any(module.training for module in old.modules())
    assert all(torch.equal(value, state[key]) for key, value in old.state_dict().items())


def test_answers_carry_no_graph_and_weights_take_no_gradient():
    old, images = teacher(), torch.randn(2, 3, 6, 6, requires_grad=True)
    assert not old(images).requires_grad
    assert not any(parameter.requires_grad for parameter in old.parameters())


def test_autocast_and_the_type_of_the_images_do_not_change_its_precision():
    old, images = teacher(), torch.randn(5, 3, 6, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(old(images), old(images.clone()))
        inside = old(images)
    assert inside.dtype == torch.float32
    assert torch.equal(inside, old(images))
    assert old(images.double()).dtype == torch.float32


def test_a_half_precision_network_answers_in_single():
    assert teacher(net().bfloat16())(torch.randn(2, 3, 6, 6)).dtype == torch.float32
    assert teacher(net().double())(torch.randn(2, 3, 6, 6)).dtype == torch.float64


def test_no_images_give_no_answers():
    assert teacher()(torch.zeros(0, 3, 6, 6)).shape == (0, 3)


def test_the_fingerprint_changes_with_weights_statistics_modules_classes_and_view_alone():
    same, first = teacher().fingerprint, net()
    assert teacher(net()).fingerprint == same
    with torch.no_grad():
        first[1].running_mean[0] += 1e-6
    others = [teacher(first), teacher(classes=("a", "c", "b"))]
    others.append(FrozenTeacher(net(), ("a", "b", "c"), View(7, 1.0, VIEW.mean, VIEW.std), "old"))
    others.append(teacher(nn.Sequential(*list(net())[:2], nn.Dropout(0.2), *list(net())[3:])))  # the same tensors
    assert len({same, *(other.fingerprint for other in others)}) == 5
    assert FrozenTeacher(net(), ("a", "b", "c"), VIEW, "another name").fingerprint == same


def test_several_classes_of_one_name_are_refused():
    with pytest.raises(ValueError, match=r"several classes of the same name.*\['a'\]"):
        teacher(classes=("a", "a", "b"))


def test_it_carries_where_the_samples_of_its_run_are_listed():
    assert teacher().manifest is None
    known = FrozenTeacher(net(), ("a", "b", "c"), VIEW, "old", manifest=Path("run/manifest.parquet"))
    assert known.manifest == Path("run/manifest.parquet")
    assert known.fingerprint == teacher().fingerprint
