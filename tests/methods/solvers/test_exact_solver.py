import logging

import pytest
import torch
from lightning import Callback
from lightning.pytorch.strategies import SingleDeviceStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader

from lqf_lightning.data import Batch
from lqf_lightning.linear import fit_kfac
from lqf_lightning.methods import LQF
from methods.dense_lqf import build, flat
from methods.solvers.runs import dense, solve
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on

SOLVERS = pytest.mark.parametrize("solver", ["cg", "kernel"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"solver": "newton"}, r"auto, sgd, cg or kernel, got 'newton'\. Set method\.solver=auto"),
        ({"solver": "cg", "ridge": 0}, r"positive `ridge`, got 0\. Set method\.ridge"),
        ({"solver": "kernel", "ridge": 0.0}, r"positive `ridge`, got 0\.0\. Set method\.ridge"),
        ({"ridge": "best"}, r"got 'best'\. Set method\.ridge=auto"),
        ({"ridge": float("inf")}, r"got inf\. Set method\.ridge"),
        ({"solver": "cg", "loss": "cross_entropy"}, r"Set method\.loss=squared, or method\.solver=sgd"),
        ({"solver": "kernel", "loss": "cross_entropy"}, r"Set method\.loss=squared, or method\.solver=sgd"),
        ({"ridge": "auto", "loss": "cross_entropy"}, r"Set method\.loss=squared"),
        ({"group_ridge": {"stem": 0.0}}, r"got \{'stem': 0\.0\}\. Set method\.group_ridge"),
        ({"group_ridge": {"stem": float("nan")}}, r"Set method\.group_ridge"),
        ({"group_ridge": {"stage9": 1.0}}, r"\['stage9'\]\. Set method\.group_ridge"),
        ({"metric": "fisher"}, r"got 'fisher'\. Set method\.metric=identity"),
        ({"metric": "kfac", "solver": "cg"}, r"preconditioner=none.*Set method\.metric=identity"),
        ({"metric": "kfac", "solver": "kernel", "preconditioner": fit_kfac}, r"Set method\.metric=identity"),
        ({"metric": "kfac", "solver": "cg", "preconditioner": fit_kfac, "ridge": "auto"}, r"Set method\.metric"),
        (
            {"metric": "kfac", "solver": "cg", "preconditioner": fit_kfac, "group_ridge": {"head": 2.0}},
            r"Set method\.metric=identity",
        ),
        ({"tolerance": 0}, r"got 0\. Set method\.tolerance=1e-3"),
        ({"acceleration": "turbo"}, r"got 'turbo'\. Set method\.acceleration=auto"),
        ({"memory_gib": float("nan")}, r"got nan\. Set method\.memory_gib=4"),
    ],
)
def test_wrong_options_name_the_override(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


@pytest.fixture
def nothing_computed(monkeypatch):
    """Fails if a refusal comes later than it has to."""
    from lqf_lightning.methods.solvers.training_table import TrainingTable

    monkeypatch.setattr(TrainingTable, "collect", lambda *_: pytest.fail("this should have been refused before"))


@SOLVERS
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_train_batches": 2}, r"limit_train_batches=2\. Set trainer\.limit_train_batches=1\.0"),
        ({"limit_train_batches": 0.5}, r"limit_train_batches=0\.5\. Set trainer\.limit_train_batches=1\.0"),
        ({"overfit_batches": 1}, r"without trainer\.overfit_batches"),
        ({"fast_dev_run": True}, r"trainer\.fast_dev_run; for fewer samples, set data\.subset_ratio"),
        ({"precision": "bf16-mixed"}, r"got 'bf16-mixed'\. Set trainer\.precision=32-true"),
        ({"precision": "bf16-true"}, r"got 'bf16-true'\. Set trainer\.precision=32-true"),
    ],
)
@pytest.mark.usefixtures("nothing_computed")
def test_trainers_that_cannot_be_exact_are_told_what_to_set(solver, options, message):
    trainer = build_trainer(2, **options)
    with pytest.raises(ValueError, match=message):
        fit_on(trainer, build(solver=solver), TensorData(*draw(6), 2))


@SOLVERS
@pytest.mark.parametrize("option", [{"accumulate_grad_batches": 2}, {"gradient_clip_val": 1.0}])
@pytest.mark.usefixtures("nothing_computed")
def test_what_only_ordinary_steps_know_is_refused(solver, option):
    with pytest.raises(MisconfigurationException, match=next(iter(option))):
        fit_on(build_trainer(2, **option), build(solver=solver), TensorData(*draw(6), 2))


@SOLVERS
@pytest.mark.usefixtures("nothing_computed")
def test_a_data_module_without_sweeps_is_refused(solver):
    data = TensorData(*draw(6), 2)
    del data.sweeps
    with pytest.raises(TypeError, match=r"`sweeps`\); got TensorData\. Use ImageDataModule.*method\.solver=sgd"):
        fit_on(build_trainer(2), build(solver=solver), data)


@pytest.mark.parametrize("solver", ["cg", "kernel", "sgd"])
@pytest.mark.usefixtures("nothing_computed")
def test_strategies_that_divide_the_model_are_refused(solver, monkeypatch):
    method, trainer = build(solver=solver), build_trainer(2)
    monkeypatch.setattr("lqf_lightning.methods.lqf_refusals.SingleDeviceStrategy", type("Other", (), {}))
    assert isinstance(trainer.strategy, SingleDeviceStrategy)
    with pytest.raises(TypeError, match=r"got SingleDeviceStrategy\. Set trainer\.strategy=ddp"):
        fit_on(trainer, method, TensorData(*draw(6), 2))


def test_sweeps_in_another_order_are_noticed():
    class Backward(TensorData):
        def train_dataloader(self):
            images, target = self.splits["train"]
            rows = [Batch(images[[i]], target[[i]], torch.tensor([i])) for i in reversed(range(len(target)))]
            return DataLoader(rows * 2, batch_size=None)

    with pytest.raises(ValueError, match=r"brought the samples \[5\], expected \[0\]: .* must repeat the batches"):
        fit_on(build_trainer(2), build(solver="cg"), Backward(*draw(6), 1))


def test_checkpoints_of_another_solver_are_refused(tmp_path):
    solve(build(solver="cg"), epochs=1).save_checkpoint(tmp_path / "run.ckpt")
    for solver in ("sgd", "kernel"):
        with pytest.raises(
            ValueError, match=rf"solver=cg, which.*solver={solver}\. Set method\.solver=cg, or ckpt_path"
        ):
            solve(build(solver=solver), epochs=2, ckpt_path=tmp_path / "run.ckpt", weights_only=True)


class SaveAfter(Callback):
    """Saves a checkpoint when a batch of the second epoch is done."""

    def __init__(self, batch, path):
        self.batch, self.path = batch, path

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if (trainer.current_epoch, batch_idx) == (1, self.batch):
            trainer.save_checkpoint(self.path)


@pytest.mark.parametrize("batch", [0, 2, 4])
def test_checkpoints_from_within_an_epoch_are_refused(batch, tmp_path):
    solve(build(solver="cg"), epochs=2, callbacks=[SaveAfter(batch, tmp_path / "run.ckpt")])
    with pytest.raises(ValueError, match=rf"within an epoch, before batch {batch + 1}, .*Set ckpt_path"):
        solve(build(solver="cg"), epochs=3, ckpt_path=tmp_path / "run.ckpt", weights_only=True)


@SOLVERS
def test_checkpoints_bring_back_the_model_without_a_trainer(solver, tmp_path):
    method = build(solver=solver, ridge=0.02)
    solve(method, epochs=3).save_checkpoint(tmp_path / "run.ckpt")
    other = build(solver=solver, ridge=0.02)
    other.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    images = draw(5, seed=8)[0]
    assert torch.equal(other(images), method(images))
    trainer = build_trainer(1, limit_test_batches=1.0)
    trainer.test(build(solver=solver), TensorData(*draw(5)), tmp_path / "run.ckpt", verbose=False, weights_only=True)


def test_a_test_does_not_touch_the_next_fit(tmp_path):
    method = build(solver="cg", ridge=0.02, tolerance=1e-12)
    solve(method, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    solve(method, epochs=1)
    trainer, data = build_trainer(1, limit_test_batches=1.0), TensorData(*draw(5))
    trainer.test(method, data, tmp_path / "run.ckpt", verbose=False, weights_only=True)
    solve(method)
    expected = dense(method).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()
    assert method.solver.descent.steps > 5  # a new iteration, not the old one's directions


@SOLVERS
@pytest.mark.usefixtures("nothing_computed")
def test_a_tolerance_beyond_single_precision_is_refused(solver):
    single = build_backbone(dtype=torch.float32)
    method = LQF(single, CLASSES, optimizer=SGD, ridge=0.02, solver=solver, tolerance=1e-9)
    with pytest.raises(ValueError, match=r"tolerance=1e-09 .* Set trainer\.precision=64-true, or method\.tolerance"):
        fit_on(build_trainer(2), method, TensorData(*draw(6, dtype=torch.float32), 2))


@pytest.mark.parametrize(
    ("dtype", "precision", "tolerance"),
    [(torch.float64, "32-true", 1e-9), (torch.float32, "64-true", 1e-9), (torch.float32, "32-true", 1e-6)],
)
def test_tolerances_that_can_be_certified_are_taken(dtype, precision, tolerance):
    method = LQF(build_backbone(dtype=dtype), CLASSES, optimizer=SGD, ridge=0.3, solver="cg", tolerance=tolerance)
    trainer = build_trainer(40, precision=precision)
    fit_on(trainer, method, TensorData(*draw(6, dtype=dtype), 2))
    assert trainer.callback_metrics["train/relative_gradient"] <= tolerance


@pytest.mark.usefixtures("nothing_computed")
def test_the_kernel_solver_takes_one_epoch():
    trainer = build_trainer(3, min_epochs=2)
    with pytest.raises(ValueError, match=r"got min_epochs=2 and min_steps=None\. Set trainer\.min_epochs=1"):
        fit_on(trainer, build(solver="kernel"), TensorData(*draw(6), 2))


@pytest.mark.parametrize(
    ("ridge", "tolerance", "level", "text"),
    [
        (1e-5, 0.03, logging.WARNING, "the bound says nothing: set method.tolerance lower, or method.ridge higher"),
        (1.0, 1e-6, logging.INFO, "arrived at a relative gradient of"),
        (1.0, 1e-13, logging.WARNING, "stopped above tolerance=1e-13"),
    ],
)
def test_the_end_of_a_run_says_what_its_certificate_is_worth(ridge, tolerance, level, text, caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = build(solver="cg", ridge=ridge, tolerance=tolerance, acceleration="none")
    solve(method, epochs=3 if tolerance == 1e-13 else 300)
    (record,) = (r for r in caplog.records if "a relative gradient of" in r.getMessage())
    assert record.levelno == level
    assert text in record.getMessage()
    problem, dw = dense(method), flat(method.linearized.deltas)
    far = problem.gradient_length(dw) / problem.ridge
    assert (far > problem.length(dw)) == ("says nothing" in text)
    assert f"within {far:.3g} of the optimum, its own length is {problem.length(dw):.3g}" in record.getMessage()
