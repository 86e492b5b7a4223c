from dataclasses import replace

import pytest
import torch

from lqf_lightning.linear import Kernel
from lqf_lightning.methods.solvers import kernel
from methods import dense_lqf
from methods.dense_lqf import DenseProblem, build, flat
from methods.solvers.runs import Note, dense, solve
from methods.tensors import TensorData, build_backbone, build_trainer, draw, fit_on

EXACT = {"solver": "kernel", "ridge": 0.02}


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, None),
        ({"group_ridge": {"stem": 10.0, "head": 0.3}}, {"stem": 10.0, "head": 0.3}),
        ({"layers": ["head"]}, None),
        ({"layers": ["stage1"]}, None),
        ({"intercept": False}, None),
        ({"memory_gib": 1e-5}, None),
    ],
)
def test_one_epoch_gives_the_solution_of_the_normal_equations(options, factors):
    method = build(**EXACT, **options)
    trainer = solve(method)
    expected = dense(method, factors=factors).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()
    assert trainer.current_epoch == trainer.global_step == 1


def test_what_is_logged_is_that_of_the_dense_problem():
    note, method = Note(), build(**EXACT)
    solve(method, callbacks=[note])
    problem = dense(method)
    optimum = problem.optimum()
    error = problem.outputs(optimum) - problem.target
    (row,) = note.rows
    assert row["train/objective"] == pytest.approx(problem.objective(optimum), rel=1e-6)
    assert row["train/loss"] == pytest.approx(error.square().sum().item() / 22, rel=1e-6)
    right = (problem.outputs(optimum).argmax(-1) == problem.target.argmax(-1)).double().mean().item()
    assert row["train/acc"] == pytest.approx(right, rel=1e-6)
    assert row["train/relative_gradient"] < 1e-10
    assert problem.length(flat(method.linearized.deltas) - optimum) < 1e-9
    assert note.certificates[0].distance_bound < 1e-9


def test_the_batch_size_plays_no_part():
    first, second = build(**EXACT), build(**EXACT)
    solve(first, batch_size=1)
    solve(second, batch_size=11)
    first, second = flat(first.linearized.deltas), flat(second.linearized.deltas)
    assert (first - second).norm() < 1e-10 * first.norm()


def test_a_solved_run_is_not_solved_again(tmp_path, monkeypatch):
    first, second = build(**EXACT), build(**EXACT)
    solve(first).save_checkpoint(tmp_path / "run.ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(kernel, "assemble_kernel", lambda *_, **__: pytest.fail("there is nothing to do"))
        solve(second, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert torch.equal(flat(second.linearized.deltas), flat(first.linearized.deltas))
    third = build(**EXACT | {"ridge": 0.5})
    solve(third, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    expected = dense(third).optimum()
    assert (flat(third.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()


def test_an_interrupted_assembly_goes_on_from_its_folder(tmp_path, monkeypatch):
    def run(name, seed=1):
        factors = {"stem": 2.0, "stage1": 3.0}  # groups of the same ridge share a kernel
        method = build(**EXACT, kernel_folder=str(tmp_path / name), group_ridge=factors)
        solve(method, seed=seed)
        return flat(method.linearized.deltas)

    def pull_the_plug(self, key, tensor, keep=kernel.TensorFolder.__setitem__):
        if len(self) == 2:
            raise KeyboardInterrupt
        keep(self, key, tensor)

    whole = run("whole")
    with monkeypatch.context() as patch:
        patch.setattr(kernel.TensorFolder, "__setitem__", pull_the_plug)
        with pytest.raises((KeyboardInterrupt, SystemExit)):
            run("parts")
    folder = kernel.TensorFolder(tmp_path / "parts")
    assert len(folder) == 2  # of three
    assert torch.equal(run("parts"), whole)
    for name in list(folder):
        folder[name] = folder[name] * 2
    assert not torch.allclose(run("parts"), whole)  # so they are used
    with pytest.raises(ValueError, match="Give an empty store"):
        run("parts", seed=2)


def test_layer_groups_of_the_same_ridge_share_a_kernel(tmp_path):
    method = build(**EXACT, kernel_folder=str(tmp_path), group_ridge={"stem": 2.0, "head": 2.0})
    solve(method)
    assert len(kernel.TensorFolder(tmp_path)) == 2
    expected = dense(method, factors={"stem": 2.0, "head": 2.0}).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()


def test_too_many_rows_are_refused_before_the_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "_LIMIT", 30)
    with pytest.raises(ValueError, match=r"at most 30 samples times classes, got 11 x 3 = 33\. Set method\.solver=cg"):
        solve(build(**EXACT))


def test_fewer_rows_are_taken_where_a_ridge_is_chosen(monkeypatch):
    monkeypatch.setattr(kernel, "_PATH_LIMIT", 30)
    solve(build(**EXACT))
    with pytest.raises(ValueError, match=r"ridge=auto .* at most 30 samples times classes, got 11 x 3 = 33"):
        solve(build(**EXACT | {"ridge": "auto"}))


def rounded(*arguments, assemble=kernel.assemble_kernel, **options):
    """The kernel with its rows and columns off by a thousandth."""
    kernels = assemble(*arguments, **options)
    exact = kernels.train
    off = 1 + 1e-3 * torch.randn(33, generator=torch.Generator().manual_seed(0))
    groups = {name: matrix * off[:, None] * off for name, matrix in exact.groups.items()}
    return replace(kernels, train=Kernel(groups, exact.outputs, exact.form))


def single_precision(monkeypatch, **options):
    """A solved method in single precision, and the dense problem of its very weights and images in double."""
    monkeypatch.setattr(dense_lqf, "build_backbone", lambda: build_backbone(dtype=torch.float32))
    images, label = draw(11, dtype=torch.float32)
    method, trainer = build(**EXACT | options), build_trainer(1)
    fit_on(trainer, method, TensorData(images, label, 4))

    def double():
        backbone = build_backbone(dtype=torch.float32)
        backbone.model.double()
        return backbone

    monkeypatch.setattr(dense_lqf, "build_backbone", double)
    problem = DenseProblem(images.double(), label, list(method.linearized.deltas), 11 * method.ridge)
    dw = flat(method.linearized.deltas).double()
    gradient, start = problem.gradient_length(dw), problem.gradient_length(torch.zeros_like(dw))
    return trainer.callback_metrics, method, problem, gradient, start


def test_logged_certificates_are_of_the_model_and_not_of_the_rounded_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "assemble_kernel", rounded)
    monkeypatch.setattr(kernel, "_STEPS", 1)
    logged, _, problem, gradient, start = single_precision(monkeypatch)
    assert gradient > 1e-4 * start
    assert float(logged["train/relative_gradient"]) == pytest.approx(gradient / start, rel=1e-2)
    assert float(logged["train/distance_bound"]) == pytest.approx(gradient / problem.ridge, rel=1e-2)


@pytest.mark.parametrize("assemble", [kernel.assemble_kernel, rounded])
def test_steps_make_up_for_the_rounding_of_the_kernel(assemble, monkeypatch):
    monkeypatch.setattr(kernel, "assemble_kernel", assemble)
    logged, method, problem, gradient, start = single_precision(monkeypatch)
    reached = float(logged["train/relative_gradient"])
    assert 1e-10 < reached <= 1e-6  # 1e-16 would be that of the stored kernel
    assert gradient / start == pytest.approx(reached, abs=2e-6)
    dw = flat(method.linearized.deltas).double()
    assert problem.length(dw - problem.optimum()) < 2e-6 * start / problem.ridge
