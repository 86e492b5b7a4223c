from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from lqf_lightning._instantiate import instantiate
from lqf_lightning.methods import Finetune
from lqf_lightning.methods.losses import scaled_squared_loss
from lqf_lightning.methods.schedule import cosine
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit, gradient, snapshot
from tiny import compose, run_tiny

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
LAYERS = {"stem": ("conv1", "bn1"), "stage1": ("conv2", "bn2"), "head": ("fc",)}


def build(**options):
    return Finetune(build_backbone(), CLASSES, **{"optimizer": SGD, **options})


def moved(before, method):
    """Names below `model.` whose value is another one now, bit by bit."""
    now = method.state_dict()
    return {n.removeprefix("model.") for n in before if n.startswith("model.") and not torch.equal(before[n], now[n])}


def below(*layers, statistics):
    names = {n.removeprefix("model.") for n in build().state_dict() if n.startswith("model.")}
    inside = {n for n in names if n.split(".")[0] in layers}
    return {n for n in inside if n.endswith(STATISTICS)} if statistics else {
        n for n in inside if not n.endswith(STATISTICS)
    }  # fmt: skip


@pytest.mark.parametrize("chosen", [["head"], ["stage1", "head"], ["stem"], None])
@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_only_the_chosen_groups_move_and_only_their_statistics(chosen, batch_norm):
    method = build(layers=chosen, batch_norm=batch_norm)
    before = snapshot(method)
    fit(method, *draw(12), epochs=2, batch_size=6)
    inside = [layer for group in chosen or LAYERS for layer in LAYERS[group]]
    expected = below(*inside, statistics=False)
    if batch_norm == "train":
        expected |= below(*inside, statistics=True)
    assert moved(before, method) == expected


def test_running_statistics_are_those_of_the_batch():
    method = build(batch_norm="train")
    images, target = draw(8)
    mean, variance = method.model.bn1.running_mean.clone(), method.model.bn1.running_var.clone()
    seen = method.model.conv1(images).detach().transpose(0, 1).flatten(1)
    fit(method, images, target)
    norm = method.model.bn1
    assert torch.allclose(norm.running_mean, 0.9 * mean + 0.1 * seen.mean(1), rtol=1e-12)
    assert torch.allclose(norm.running_var, 0.9 * variance + 0.1 * seen.var(1), rtol=1e-12)


def test_a_network_that_comes_in_eval_mode_is_trained_in_training_mode():
    backbone = build_backbone()
    assert not backbone.model.training
    method = Finetune(backbone, CLASSES, optimizer=SGD, layers=["stage1", "head"])
    training = {name for name, module in method.model.named_modules() if module.training}
    assert training == {"", "act1", "conv2", "bn2", "act2", "drop", "pool", "flat", "fc"}


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_a_step_follows_the_gradient_times_the_rate_of_its_group(loss):
    factors = {"stem": 0.0, "head": 10.0}
    method = build(loss=loss, target_scale=3.0, batch_norm="frozen", group_lr=factors)
    method.model.drop.p = 0.0
    images, target = draw(7)

    def objective(model):
        return cross_entropy(model(images), target) if loss == "cross_entropy" else scaled_squared_loss(
            model(images), target, 3.0
        )  # fmt: skip

    model = method.model.eval()
    steps, before = gradient(objective, model), snapshot(method)
    fit(method, images, target)
    for group, names in method.backbone.groups.items():
        for name in names:
            expected = before[f"model.{name}"] - 0.1 * factors.get(group, 1.0) * steps[name]
            assert torch.allclose(model.get_parameter(name), expected, rtol=1e-12, atol=1e-15), name
            assert steps[name].norm() > 1e-4


def test_a_schedule_keeps_the_ratios_of_the_groups():
    method = build(scheduler=partial(cosine, warmup=0.25), group_lr={"stem": 0.5, "head": 4.0}, batch_norm="frozen")
    used = []
    method.on_train_batch_start = lambda *_: used.append({
        group["name"]: group["lr"] for group in method.trainer.optimizers[0].param_groups
    })
    fit(method, *draw(8), epochs=2, batch_size=2)
    peak = [row["stage1"] / 0.1 for row in used]
    falling = [0.5 + 0.5 * torch.tensor(torch.pi * k / 6).cos().item() for k in range(6)]
    assert peak == pytest.approx([0.5, 1.0, *falling], abs=1e-6)
    assert [row["stem"] for row in used] == pytest.approx([0.05 * share for share in peak])
    assert [row["head"] for row in used] == pytest.approx([0.4 * share for share in peak])


def test_the_linear_probe_preset_is_a_regression_on_fixed_features():
    config = compose("data.batch_size=4", "method=linear_probe", "paths.output_dir=unused")
    method = instantiate(config, "method", backbone=build_backbone(), classes=CLASSES)
    method.model.drop.p = 0.0
    before, (images, target) = snapshot(method), draw(8)
    fit(method, images, target, epochs=3, batch_size=4)
    assert moved(before, method) == {"fc.weight", "fc.bias"}
    assert isinstance(method.trainer.optimizers[0], torch.optim.AdamW)

    head, features = nn.Linear(3, 3).double(), nn.Sequential(*list(build_backbone().model)[:-1]).eval()(images).detach()
    head.load_state_dict({n: before[f"model.fc.{n}"] for n in ("weight", "bias")})
    optimizer = torch.optim.AdamW(head.parameters(), lr=0.003, weight_decay=0.0)
    schedule = cosine(optimizer, 6, warmup=0.05)
    for step in range(6):
        rows = slice(4 * (step % 2), 4 * (step % 2) + 4)
        optimizer.zero_grad()
        cross_entropy(head(features[rows]), target[rows]).backward()
        optimizer.step()
        schedule.step()
    assert torch.allclose(method.model.fc.weight, head.weight, rtol=1e-10)
    assert torch.allclose(method.model.fc.bias, head.bias, rtol=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_norm": "off"}, r"'off'.*method\.batch_norm=train"),
        ({"layers": ["stage7"]}, r"\['stem', 'stage1', 'head'\]; got \['stage7'\].*method\.layers"),
        ({"layers": []}, r"got \[\].*method\.layers"),
        ({"group_lr": {"neck": 1.0}}, r"got \['neck'\].*method\.group_lr"),
        ({"group_lr": {"head": -1.0}}, r"'head': -1\.0.*method\.group_lr=\{head: 10\}"),
        ({"loss": "hinge"}, r"method\.loss"),
    ],
)
def test_wrong_options_name_the_override(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_batch_without_a_variance_names_the_overrides():
    images, target = draw(1)
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    method.model.bn2.register_forward_pre_hook(lambda _, arguments: (arguments[0].mean((2, 3), keepdim=True),))
    with pytest.raises(ValueError, match=r"batch of 1 image.*data\.drop_last=true.*method\.batch_norm=frozen"):
        fit(method, images, target)


def test_evaluation_uses_running_statistics_and_moves_nothing():
    method = build()
    before, (images, target) = snapshot(method), draw(9)
    (got,) = build_trainer(0).test(method, datamodule=TensorData(images, target, 4), verbose=False)
    expected = cross_entropy(build_backbone().model.eval()(images), target).item()
    assert got["test/loss"] == pytest.approx(expected, rel=1e-6)
    assert moved(before, method) == set()


def test_batch_statistics_cannot_follow_frozen_ones(tmp_path, folder_of_shapes):
    options = ("method=finetune", "method.teacher=ema", "method.batch_norm=frozen")
    with pytest.raises(ValueError, match=r"method\.teacher=eman, or method\.batch_norm=train"):
        run_tiny(tmp_path, folder_of_shapes, *options)
