import json
import logging
import math
import shutil

import pytest
import torch
from torch.nn.functional import cross_entropy, one_hot

from lqf_lightning.linear import mean_of_ridge
from lqf_lightning.methods.solvers import acceleration, auto_ridge, settle_penalty
from methods.dense_lqf import ALPHA, build, flat, jacobian, outputs_at_start
from methods.solvers.runs import dense, solve
from methods.solvers.test_auto_ridge import NAMES, left_out
from methods.tensors import draw
from tiny import run_tiny

SAMPLES = 24
LEARNED = {"ridge": "auto", "metric": "learned"}


def factors(method):
    """What the ridge is multiplied with, for every entry of dw; 0 for the intercept."""
    owner = {name: group for group, names in method.penalty_groups.items() for name in names}
    return torch.cat([
        torch.full((d.numel(),), 0.0 if n == "fc.bias" else method.group_ridge[owner[n]], dtype=torch.float64)
        for n, d in method.linearized.deltas.items()
    ])  # fmt: skip


def optimum(method, keep=slice(None)):
    images, label = draw(SAMPLES)
    rows, start = jacobian(images, NAMES)[keep].flatten(0, 1), outputs_at_start(images)[keep]
    error = (ALPHA * one_hot(label, 3).double()[keep] - start).flatten()
    metric = torch.diag(factors(method)) * SAMPLES * method.ridge
    return torch.linalg.solve(rows.T @ rows + metric, rows.T @ error)


@pytest.fixture(scope="module")
def exact():
    method = build(solver="kernel", **LEARNED)
    solve(method, samples=SAMPLES)
    return method


def test_the_kernel_solver_solves_with_the_factors_that_it_has_learned(exact):
    wanted = optimum(exact)
    assert (flat(exact.linearized.deltas) - wanted).norm() < 1e-8 * wanted.norm()
    assert exact.penalty_form == "full"
    assert exact.group_ridge.keys() == {"stem", "stage1", "head"}
    assert exact.ridge == pytest.approx(mean_of_ridge(exact.learned_penalty.ridge, SAMPLES))
    assert exact.group_ridge == pytest.approx({name: 1 / scale for name, scale in exact.learned_penalty.scales.items()})


def test_the_loss_that_is_reported_is_that_of_refits_without_each_sample(exact):
    images, label = draw(SAMPLES)
    scaled = jacobian(images, NAMES) / factors(exact).clamp_min(1e-300).sqrt().where(factors(exact) > 0, 1.0)
    target, start = ALPHA * one_hot(label, 3).double(), outputs_at_start(images)
    outputs = left_out(scaled, start, target, SAMPLES * exact.ridge)
    penalty = exact.learned_penalty
    assert float(penalty.loss[penalty.step]) == pytest.approx(
        float(cross_entropy(outputs / penalty.temperature, label)), rel=1e-6
    )
    right = float((outputs.argmax(1) == label).double().mean())
    assert float(penalty.accuracy[penalty.step]) == pytest.approx(right, rel=1e-12)
    assert exact.outlook.linear == float(penalty.accuracy[penalty.step])


def test_conjugate_gradients_reach_the_optimum_by_the_trace_kernel_that_chose_the_penalty(caplog, monkeypatch):
    monkeypatch.setattr(acceleration, "_LARGE", 0.0)
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = build(solver="cg", tolerance=1e-10, **LEARNED)
    solve(method, samples=SAMPLES)
    wanted = optimum(method)
    assert (flat(method.linearized.deltas) - wanted).norm() < 1e-7 * wanted.norm()
    assert method.penalty_form == "trace"
    assert any("the trace kernel, a surrogate" in text for text in caplog.messages)
    assert any("accelerated by the trace kernel" in text for text in caplog.messages)


def test_the_trace_kernel_is_assembled_once(monkeypatch):
    calls = []
    for module in (settle_penalty, acceleration):
        assemble = module.surrogate_kernel
        monkeypatch.setattr(module, "surrogate_kernel", lambda *a, _of=assemble, **b: calls.append(1) or _of(*a, **b))
    solve(build(solver="cg", **LEARNED), samples=SAMPLES, epochs=2)
    assert len(calls) == 1


@pytest.mark.parametrize("ridge", [0.02, "auto"])
def test_the_trace_kernel_preconditions_any_ridge(ridge):
    method = build(solver="cg", ridge=ridge, tolerance=1e-10, acceleration="trace")
    solve(method, samples=SAMPLES)
    wanted = dense(method, samples=SAMPLES).optimum()
    assert (flat(method.linearized.deltas) - wanted).norm() < 1e-7 * wanted.norm()


def test_the_solver_is_chosen_by_size(monkeypatch):
    from lqf_lightning.methods.solvers import choice

    for most, name in ((72, "kernel"), (71, "cg")):
        monkeypatch.setattr(choice, "_SMALL", most)
        method = build(solver="auto", **LEARNED)
        solve(method, samples=SAMPLES, epochs=1)
        assert method.solver.name == name


def test_a_resumed_run_keeps_its_penalty(tmp_path, monkeypatch):
    first = build(solver="cg", tolerance=1e-9, **LEARNED)
    solve(first, samples=SAMPLES, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr(settle_penalty, "learn_penalty", lambda *_, **__: pytest.fail("the penalty has been learned"))
    second = build(solver="cg", tolerance=1e-9, **LEARNED)
    solve(second, samples=SAMPLES, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert (second.ridge, second.group_ridge) == (first.ridge, first.group_ridge)
    wanted = optimum(second)
    assert (flat(second.linearized.deltas) - wanted).norm() < 1e-6 * wanted.norm()


class Chosen:
    """Data that can be asked for some of the samples."""

    def __init__(self, data):
        self.data = data

    def __call__(self, indices):
        rows = [self.data.fixed_train_dataloader().dataset[int(i)] for i in indices]
        from lqf_lightning.data import Batch

        return [Batch(torch.stack([r[0] for r in rows]), torch.stack([r[1] for r in rows]), indices)]


def test_a_large_set_learns_on_a_part_and_says_whether_that_transfers(caplog, monkeypatch):
    from methods.tensors import TensorData

    monkeypatch.setattr(TensorData, "chosen_dataloader", lambda self, i: Chosen(self)(i), raising=False)
    monkeypatch.setattr(auto_ridge, "_COMBINATIONS", None)
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = build(solver="cg", tolerance=1e-9, penalty_samples=18, acceleration="trace", **LEARNED)
    solve(method, samples=SAMPLES)
    assert any("learned on 18 of 24 training samples" in text for text in caplog.messages)
    assert any("nats per image on the other half" in text for text in caplog.messages)
    # The ridge of the sum form is that of the part; of the mean form it is smaller, as there are more images.
    assert method.ridge == pytest.approx(mean_of_ridge(method.learned_penalty.ridge, SAMPLES))
    wanted = optimum(method)
    assert (flat(method.linearized.deltas) - wanted).norm() < 1e-6 * wanted.norm()


def test_labels_of_the_validation_and_test_sets_have_no_part_in_it(folder_of_shapes, tmp_path):
    shutil.copytree(folder_of_shapes, tmp_path / "other")
    for split in ("val", "test"):  # every class under the name of another
        names = sorted(path.name for path in (tmp_path / "other" / split).iterdir())
        for name in names:
            (tmp_path / "other" / split / name).rename(tmp_path / "other" / split / f"_{name}")
        for name, wrong in zip(names, [*names[1:], names[0]], strict=True):
            (tmp_path / "other" / split / f"_{name}").rename(tmp_path / "other" / split / wrong)
    for run, root in (("a", folder_of_shapes), ("b", tmp_path / "other")):
        run_tiny(tmp_path / run, root, "method=lqf", "callbacks=[]")
    first, second = (torch.load(tmp_path / run / "checkpoints" / "last.ckpt", weights_only=True) for run in ("a", "b"))
    assert first["group_ridge"] == second["group_ridge"]
    assert first["ridge"] == second["ridge"]
    assert all(torch.equal(value, second["state_dict"][name]) for name, value in first["state_dict"].items())
    accuracies = [json.loads((tmp_path / run / "metrics.json").read_text())["test/acc"] for run in ("a", "b")]
    assert accuracies[0] != accuracies[1]  # they were changed


@pytest.mark.parametrize("solver", ["kernel", "cg"])
def test_the_penalty_does_not_depend_on_the_number_of_ranks(solver, folder_of_shapes, tmp_path):
    kept = {}
    for size in (1, 2, 3):
        ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={size}", "trainer.strategy=ddp_fork"]
        options = ["method=lqf", f"method.solver={solver}", "callbacks=[]", "test=false", "trainer.precision=64-true"]
        run_tiny(tmp_path / str(size), folder_of_shapes, *(ranks if size > 1 else []), *options)
        kept[size] = torch.load(tmp_path / str(size) / "checkpoints" / "last.ckpt", weights_only=True)
    for size in (2, 3):
        assert kept[size]["ridge"] == pytest.approx(kept[1]["ridge"], rel=1e-6)
        assert kept[size]["group_ridge"] == pytest.approx(kept[1]["group_ridge"], rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"metric": "learned", "ridge": 0.1, "solver": "cg"}, r"got solver=cg, ridge=0\.1.*Set method\.ridge=auto"),
        ({"metric": "learned", "ridge": "auto", "solver": "sgd"}, r"got solver=sgd.*method\.metric=identity"),
        ({**LEARNED, "solver": "cg", "group_ridge": {"head": 2.0}}, r"method\.group_ridge=null"),
        ({**LEARNED, "solver": "cg", "penalty_samples": 1}, r"at least 2, got 1\. Set method\.penalty_samples"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_kernel_whose_parts_do_not_fit_in_memory_is_refused_before_it_is_assembled():
    with pytest.raises(ValueError, match=r"72 rows is kept apart for 3 groups.*Set method\.solver=cg"):
        solve(build(solver="kernel", memory_gib=1e-6, **LEARNED), samples=SAMPLES)


def test_a_run_that_goes_on_with_other_groups_or_another_metric_learns_anew(tmp_path):
    first = build(solver="cg", tolerance=1e-9, **LEARNED)
    solve(first, samples=SAMPLES, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    kept = torch.load(tmp_path / "run.ckpt", weights_only=True)
    for option, other in (("penalty_by", "block"), ("metric", "identity")):
        changed = kept | {"hyper_parameters": kept["hyper_parameters"] | {option: other}}
        second = build(solver="cg", tolerance=1e-9, **LEARNED)
        second.on_load_checkpoint(changed)
        assert math.isnan(second.ridge)
        assert second.group_ridge == {}
    second.on_load_checkpoint(kept)
    assert (second.ridge, second.group_ridge) == (first.ridge, first.group_ridge)


def test_given_factors_are_not_those_of_the_checkpoint(tmp_path):
    first = build(solver="cg", ridge="auto", group_ridge={"stem": 10.0})
    solve(first, samples=SAMPLES, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    second = build(solver="cg", ridge="auto", group_ridge={"head": 0.1})
    second.on_load_checkpoint(torch.load(tmp_path / "run.ckpt", weights_only=True))
    assert second.group_ridge == {"head": 0.1}


def test_where_halves_are_too_small_to_check_the_transfer_the_run_says_so_and_goes_on(caplog, monkeypatch):
    from methods.tensors import TensorData

    monkeypatch.setattr(TensorData, "chosen_dataloader", lambda self, i: Chosen(self)(i), raising=False)
    method = build(solver="cg", tolerance=1e-6, penalty_samples=4, **LEARNED)
    solve(method, samples=SAMPLES)
    assert any("cannot be checked on halves" in text for text in caplog.messages)
    assert method.ridge > 0


def test_a_penalty_learned_without_copies_is_not_weakened_by_them(folder_of_shapes, tmp_path, monkeypatch):
    monkeypatch.setattr(settle_penalty, "set_narrow_apart", lambda *_: None)  # which depends on the number of rows
    # Copies that hardly differ make the squares of an image count threefold, and so must its penalty in the sum form.
    ridges = []
    for copies in (1, 3):
        options = ["method=lqf", "method.solver=cg", "method.penalty_samples=24", f"data.copies={copies}"]
        options += ["data/augmentation=shift", "callbacks=[]", "test=false", "trainer.max_epochs=1"]
        run_tiny(tmp_path / str(copies), folder_of_shapes, *options)
        kept = torch.load(tmp_path / str(copies) / "checkpoints" / "last.ckpt", weights_only=True)
        ridges.append(kept["ridge"])
    assert ridges[1] == pytest.approx(ridges[0], rel=1e-3)


def test_copies_are_refused_where_a_reference_decides_about_the_ridge(monkeypatch):
    monkeypatch.setattr(settle_penalty, "_copies", lambda _: 2)
    with pytest.raises(ValueError, match=r"with a reference leaves out single samples.*Set data\.copies=1"):
        settle_penalty._refuse_copies(build(solver="cg", **LEARNED), reference=True)
