import pytest
import torch

from lqf_lightning.methods.solvers import kernel
from methods.dense_lqf import build, flat
from methods.solvers.runs import Note, dense, solve

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
    def run(name, **options):
        method = build(**EXACT, kernel_folder=str(tmp_path / name), **options)
        solve(method)
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
    assert len(folder) == 2  # of three layer groups
    assert torch.equal(run("parts"), whole)
    for name in list(folder):
        folder[name] = folder[name] * 2
    assert not torch.allclose(run("parts"), whole)  # so they are used
    with pytest.raises(ValueError, match="Give an empty store"):
        run("parts", layers=["stage1", "head"])


def test_too_many_rows_are_refused_before_the_kernel(monkeypatch):
    monkeypatch.setattr(kernel, "_LIMIT", 30)
    with pytest.raises(
        ValueError, match=r"at most 30 rows, got 11 samples with 3 outputs = 33\. Set method\.solver=cg"
    ):
        solve(build(**EXACT))
