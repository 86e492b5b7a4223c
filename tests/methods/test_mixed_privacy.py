import copy
import logging

import pytest
import torch
from torch.nn.functional import one_hot

from lqf_lightning.data import Manifest
from lqf_lightning.evaluate import evaluate
from lqf_lightning.linear import LinearizedModel
from lqf_lightning.methods import LQF, MixedPrivacy
from lqf_lightning.methods.core_hash import core_hash
from methods.dense_lqf import SGD, flat, jacobian, outputs_at_start
from methods.tensors import CLASSES, TensorData, build_backbone, build_trainer, draw, fit, fit_on
from tiny import compose, run_tiny

RIDGE = 0.05
HALF = "data.core={fraction:0.5,seed:0}"
CORE = ["method=finetune", "callbacks=[]", "test=false", "data.part=core", "trainer.max_epochs=1"]
USER = ["method=mixed_privacy", "callbacks=[]", "data.part=user", "method.ridge=0.05", "trainer.max_epochs=30"]


def build(dtype=torch.float64, **options):
    return MixedPrivacy(
        build_backbone(dtype=dtype), CLASSES, **{"optimizer": SGD, "ridge": RIDGE, "normalize_step": False, **options}
    )


@pytest.fixture(scope="module")
def core_run(folder_of_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("core")
    run_tiny(folder, folder_of_shapes, HALF, *CORE)
    return folder


@pytest.fixture(scope="module")
def user_run(core_run, folder_of_shapes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("user")
    metrics = run_tiny(folder, folder_of_shapes, HALF, weights_of(core_run), *USER)
    return folder, metrics


def weights_of(run):
    return f"backbone.weights={run}/checkpoints/last.ckpt"


def last(folder):
    return torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize("solver", ["cg", "kernel"])
def test_the_optimum_is_that_of_the_penalized_problem_bias_included(solver):
    method, (images, target) = build(solver=solver, tolerance=1e-10), draw(9)
    fit(method, images, target, epochs=1 if solver == "kernel" else 40)
    rows = jacobian(images, list(method.linearized.deltas)).flatten(0, 1)
    residual = (one_hot(target, 3) - outputs_at_start(images)).flatten()
    hessian = rows.T @ rows / 9 + RIDGE * torch.eye(rows.shape[1], dtype=torch.float64)
    expected = torch.linalg.solve(hessian, rows.T @ residual / 9)
    distance = (flat(method.linearized.deltas) - expected).norm()
    assert distance <= 1e-8 * expected.norm()  # 1e-10 of the gradient, times |J^T r| / (mu |w|), below 100 here
    assert "fc.bias" in method.penalty_weights()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_forgetting_everything_brings_the_core_back_bitwise(dtype):
    method, (images, target) = build(dtype), draw(9, dtype=dtype)
    network = build_backbone(dtype=dtype).model
    start = LinearizedModel(copy.deepcopy(network), list(method.linearized.deltas), example=images[:2])(images)
    fit(method, images, target, epochs=3)
    assert not torch.allclose(method(images), start, rtol=1e-2)
    method.forget_everything()
    assert torch.equal(method(images), start)
    plain = network(images)
    assert (method(images) - plain).norm() <= 1e-5 * plain.norm()


@pytest.mark.parametrize("solver", ["sgd", "cg", "kernel"])
def test_training_leaves_the_core_alone(solver):
    method, data = build(solver=solver), draw(9)
    core = copy.deepcopy(method.linearized.model.state_dict())
    fit(method, *data, epochs=1 if solver == "kernel" else 2)
    method.verify_core()
    for name, value in method.linearized.model.state_dict().items():
        assert torch.equal(value, core[name])
    assert method.core_hash == core_hash(build_backbone().model.state_dict())


@pytest.mark.parametrize("name", ["conv1.weight", "bn1.running_mean", "fc.bias"])
def test_training_that_touches_the_core_is_caught(name):
    method, data = build(), draw(9)
    step = method.on_before_optimizer_step

    def touch(optimizer):
        step(optimizer)
        method.linearized.model.state_dict()[name].flatten()[0].add_(1e-12)

    method.on_before_optimizer_step = touch
    with pytest.raises(RuntimeError, match=r"the core in memory has the hash \w{16}\.\.\., expected"):
        fit(method, *data)
    with pytest.raises(RuntimeError, match="the core in memory"):
        method.forget_everything()


def test_a_core_that_was_changed_between_training_and_loading_is_caught(user_run):
    folder, _ = user_run
    checkpoint, method = last(folder), build()
    method.on_load_checkpoint(checkpoint)
    assert method.core_hash == checkpoint["core"]["hash"]
    next(value for name, value in checkpoint["state_dict"].items() if "model.conv1" in name).flatten()[0] += 1e-6
    with pytest.raises(RuntimeError, match="the core in the checkpoint has the hash"):
        method.on_load_checkpoint(checkpoint)


def test_a_checkpoint_of_another_method_is_refused():
    method = build()
    with pytest.raises(ValueError, match=r"no fingerprint of its core.*method=lqf"):
        method.on_load_checkpoint({"state_dict": method.state_dict(), "hyper_parameters": {}})


def test_the_same_core_has_the_same_hash_in_another_precision():
    method, (images, target) = build(torch.float32), draw(9, dtype=torch.float32)
    before = method.core_hash
    fit_on(build_trainer(1, precision="64-true"), method, TensorData(images, target))
    assert method.linearized.model.conv1.weight.dtype == torch.float64
    assert method.core_hash == before
    method.verify_core()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": 0.0}, r"strongly convex.*got 0\.0\. Set method\.ridge=5e-4"),
        ({"tolerence": 1.0}, r"`method\.tolerence` is no option of MixedPrivacy. Did you mean `method\.tolerance`"),
    ],
)
def test_options_that_cannot_be_met_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_core_run_is_read_with_its_head_and_recorded(core_run, user_run):
    folder, metrics = user_run
    checkpoint, core = last(folder), last(core_run)["state_dict"]
    for name, value in core.items():
        if name.startswith("model."):
            assert torch.equal(checkpoint["state_dict"][f"linearized.{name}"], value)
    record = checkpoint["core"]
    state = {name.removeprefix("model."): value for name, value in core.items() if name.startswith("model.")}
    assert record["hash"] == core_hash(state)
    assert record["samples"] == 12
    assert f"student of {core_run}/checkpoints/last.ckpt" in record["source"]
    assert record["manifest"] == f"{core_run}/manifest.parquet"
    assert checkpoint["hyper_parameters"]["core"] == record
    trained = {run: set(Manifest.read(run / "manifest.parquet").rows("train")["sha"]) for run in (core_run, folder)}
    assert len(trained[core_run]) == len(trained[folder]) == 12
    assert not trained[core_run] & trained[folder]
    assert metrics["train/relative_gradient"] < 1e-3


def test_evaluation_and_resumption_accept_it(user_run, core_run, folder_of_shapes, tmp_path):
    folder, metrics = user_run
    options = [f"checkpoint={folder}/checkpoints/last.ckpt", f"paths.output_dir={tmp_path}/eval", "logger=[]"]
    found = evaluate(compose(*options, "callbacks=[]", "progress=none", "trainer=cpu", name="eval"))
    assert found["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-6)
    again = run_tiny(folder, folder_of_shapes, HALF, weights_of(core_run), *USER)
    assert again["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-6)
    assert last(folder)["core"]["samples"] == 12


def test_a_core_that_was_trained_on_user_data_is_refused(core_run, folder_of_shapes, tmp_path):
    with pytest.raises(ValueError, match=r"12 of the 24 training images were used to train the core .*data\.part=user"):
        run_tiny(tmp_path, folder_of_shapes, weights_of(core_run), *USER, "data.part=all")
    other = "data.core={fraction:0.5,seed:1}"
    with pytest.raises(ValueError, match=r"of the 12 training images were used to train the core"):
        run_tiny(tmp_path, folder_of_shapes, other, weights_of(core_run), *USER)


def test_a_core_that_nobody_knows_the_data_of_is_allowed_and_recorded_as_such(folder_of_shapes, tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        run_tiny(tmp_path, folder_of_shapes, *USER, "data.part=all", "test=false", "trainer.max_epochs=2")
    assert "core from random: no run folder tells what it was trained on" in caplog.text
    assert last(tmp_path)["core"]["trained_on"] is None


def test_everything_for_lqf_is_for_it():
    assert isinstance(build(), LQF)


def test_two_ranks_find_what_one_finds(user_run, core_run, folder_of_shapes, tmp_path):
    folder, metrics = user_run
    ranks = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.strategy=ddp_fork", "trainer.devices=2"]
    found = run_tiny(tmp_path, folder_of_shapes, HALF, weights_of(core_run), *USER, *ranks)
    assert found["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-3)  # the relative gradient of either
    one, two = last(folder), last(tmp_path)
    assert two["core"] == one["core"]
    with pytest.raises(Exception, match="of the 24 training images were used to train the core"):
        run_tiny(tmp_path / "all", folder_of_shapes, weights_of(core_run), *USER, "data.part=all", *ranks)
