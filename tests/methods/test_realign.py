import copy
from functools import partial

import pytest
import torch
from torch import nn

from lqf_lightning.backbones import create_backbone
from lqf_lightning.methods.realign import Realign


def original():
    torch.manual_seed(0)
    backbone = create_backbone("test_resnet", 5, library="timm", weights=None, head_std=0.5)
    for norm in backbone.model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # some are 0 at first
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.5, 1.5)
    return backbone


def realign(backbone=None, **options):
    options = {"head_is_published": True, "slope": 0.1, "optimizer": partial(torch.optim.SGD, lr=0.1), **options}
    return Realign(backbone or original(), **options)


@pytest.fixture
def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(1))


def test_a_network_that_computes_the_same_has_no_loss(images):
    # Slope 0 is ReLU itself, and test_resnet has no ceiling.
    assert realign(slope=0.0).eval().loss(images).item() == 0.0


def test_a_head_that_was_drawn_has_no_say(images):
    method = realign(head_is_published=False).eval()
    before = method.loss(images)
    with torch.no_grad():
        method.original_model.get_submodule(method.original.head).weight.mul_(3)
    assert torch.equal(method.loss(images), before)


def test_steps_change_the_student_and_neither_the_original_nor_the_head(images):
    method = realign()
    before = copy.deepcopy(method.state_dict())
    optimizer = method.configure_optimizers()
    method.loss(images).backward()
    optimizer.step()
    changed = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    head = method.original.head
    assert changed
    assert all(name.startswith("model.") and not name.startswith(f"model.{head}.") for name in changed)
    trained = {name for name, _ in method.model.named_parameters() if not name.startswith(f"{head}.")}
    assert trained <= {name.removeprefix("model.") for name in changed}


@pytest.mark.parametrize(("batch_norm", "moves"), [("train", True), ("frozen", False)])
def test_batch_norm_follows_the_batches_or_stays(images, batch_norm, moves):
    method = realign(batch_norm=batch_norm).train()
    before = copy.deepcopy(method.state_dict())
    method.loss(images)
    moved = {name for name, tensor in method.state_dict().items() if not torch.equal(tensor, before[name])}
    assert bool(moved) is moves
    assert all(name.startswith("model.") for name in moved)


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"batch_norm": "eval"}, r"'train' or 'frozen', got eval\. Set method\.batch_norm=train"),
        ({"temperature": 0.0}, r"above 0, got 0\.0\. Set method\.temperature=1"),
        ({"statistics_passes": -1}, r"at least 0, got -1\. Set method\.statistics_passes=2"),
        ({"anneal": 2.0}, r"in \[0, 1\], got 2\.0\. Set method\.anneal=0\.5"),
        (
            {"statistics_passes": 1},
            r"do not fit the original activations.*Set method\.statistics_passes=0 or method\.ann",
        ),
        ({"group_weight": -1.0}, r"at least 0, got -1\.0\. Set method\.group_weight=1"),
        (
            {"head_is_published": False, "feature_weight": 0.0},
            r"nothing after the last layer.*method\.feature_weight=1",
        ),
        ({"slope": 2.0}, r"got backbone\.leaky_slope=2\.0, expected a number in \[0, 1\]"),
    ],
)
def test_options_out_of_range_are_refused_with_the_override(options, complaint):
    with pytest.raises(ValueError, match=complaint):
        realign(**options)


def test_a_checkpoint_of_another_adaptation_is_refused():
    kept = {}
    method = realign()
    method.gaps = {"swapped": {"feature_error": 2.0}}
    method.on_save_checkpoint(kept)
    with pytest.raises(ValueError, match=r"cannot go on with \(0\.2, 'random'\)\. Set ckpt_path=null"):
        realign(slope=0.2).on_load_checkpoint(kept)
    again = realign()
    again.on_load_checkpoint(kept)
    assert again.gaps == method.gaps


def test_activations_go_over_in_the_given_share_of_the_steps(monkeypatch):
    method = realign(anneal=0.5)
    assert method._mixtures
    monkeypatch.setattr("lqf_lightning.methods.realign.scheduled_steps", lambda trainer: 8)
    shares = []
    for step in range(8):
        monkeypatch.setattr(Realign, "global_step", step)
        monkeypatch.setattr(Realign, "trainer", None)
        method.on_train_batch_start(None, 0)
        shares.append(method._mixtures[0].share)
    assert shares == [0.25, 0.5, 0.75, 1, 1, 1, 1, 1]
    assert not realign(anneal=0.0)._mixtures
