import logging

import pytest
import torch
from torch.nn.functional import one_hot

from lqf_lightning.linear import RegularizationPath
from lqf_lightning.methods.solvers import auto_ridge
from methods.dense_lqf import ALPHA, build, flat, jacobian, outputs_at_start
from methods.solvers.runs import Note, dense, solve
from methods.tensors import TensorData, build_trainer, draw, fit_on

SAMPLES = 24


def left_out(rows, start, target, ridge):
    """Outputs on each sample of the optimum without it, refitted; the last three columns of rows are the intercept."""
    penalty = torch.ones(rows.shape[2], dtype=torch.float64)
    penalty[-3:] = 0
    outputs = []
    for i in range(len(rows)):
        keep = [j for j in range(len(rows)) if j != i]
        own, error = rows[keep].flatten(0, 1), (target - start)[keep].flatten()
        optimum = torch.linalg.solve(own.T @ own + ridge * torch.diag(penalty), own.T @ error)
        outputs.append(start[i] + rows[i] @ optimum)
    return torch.stack(outputs)


def best_by_brute_force(ridges, seed):
    images, label = draw(SAMPLES, seed)
    rows, start = jacobian(images, NAMES), outputs_at_start(images)
    target = ALPHA * one_hot(label, 3).double()
    scores = []
    for ridge in ridges:
        outputs = left_out(rows, start, target, ridge)
        right, error = (outputs.argmax(-1) == label).double().mean(), (outputs - target).square().sum()
        scores.append((float(right), -float(error), ridge))
    return max(scores)


NAMES = ["conv1.weight", "bn1.weight", "bn1.bias", "conv2.weight", "bn2.weight", "bn2.bias", "fc.weight", "fc.bias"]


@pytest.mark.parametrize("seed", [1, 3])
def test_the_kernel_solver_takes_the_best_by_leave_one_out(seed, caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    note, method = Note(), build(solver="kernel", ridge="auto")
    solve(method, samples=SAMPLES, seed=seed, callbacks=[note])
    accuracy, _, ridge = best_by_brute_force(method.path.ridges.tolist(), seed)
    assert method.ridge == pytest.approx(ridge / SAMPLES, rel=1e-12)
    assert any(f"ridge={method.ridge:.4g}" in m and f"{accuracy:.3f}" in m for m in caplog.messages)
    assert note.rows[0]["train/ridge"] == pytest.approx(method.ridge, rel=1e-6)
    expected = dense(method, samples=SAMPLES, seed=seed).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-8 * expected.norm()


@pytest.mark.parametrize("solver", ["cg", "sgd"])
def test_others_take_that_of_the_surrogate(solver, monkeypatch):
    monkeypatch.setattr(auto_ridge, "_COMBINATIONS", None)  # all outputs: the mean of their kernels
    method = build(solver=solver, ridge="auto", intercept=False)
    solve(method, samples=SAMPLES, epochs=1)
    images, label = draw(SAMPLES)
    rows, start = jacobian(images, NAMES), outputs_at_start(images)
    kernel = torch.einsum("icp,jcp->ij", rows, rows) / 3
    target = ALPHA * one_hot(label, 3).double()
    scores = []
    for ridge in method.path.ridges.tolist():
        inverse = torch.linalg.inv(kernel + ridge * torch.eye(SAMPLES, dtype=torch.float64))
        outputs = target - inverse @ (target - start) / inverse.diagonal()[:, None]
        right, error = (outputs.argmax(-1) == label).double().mean(), (outputs - target).square().sum()
        scores.append((float(right), -float(error), ridge))
    assert method.ridge == pytest.approx(max(scores)[2] / SAMPLES, rel=1e-9)


def test_a_number_is_left_alone():
    note, method = Note(), build(solver="cg", ridge=0.3)
    solve(method, epochs=1, callbacks=[note])
    assert method.ridge == 0.3
    assert method.path is None
    assert "train/ridge" not in note.rows[0]


def test_a_resumed_run_keeps_its_choice(tmp_path, monkeypatch):
    first = build(solver="cg", ridge="auto", tolerance=1e-9)
    solve(first, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr(auto_ridge, "surrogate_kernel", lambda *_: pytest.fail("the ridge has been chosen"))
    second = build(solver="cg", ridge="auto", tolerance=1e-9)
    solve(second, epochs=4, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert second.ridge == first.ridge
    third = build(solver="cg", ridge=0.7, tolerance=1e-9)  # asked for by name
    solve(third, epochs=4, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert third.ridge == 0.7


def test_too_many_samples_for_a_choice_are_refused(monkeypatch):
    monkeypatch.setattr(auto_ridge, "_LIMIT", 10)
    with pytest.raises(ValueError, match=r"at most 10 training samples, got 11\. Set method\.ridge"):
        solve(build(solver="cg", ridge="auto"))


@pytest.mark.parametrize(("solver", "kind"), [("cg", "the trace kernel, a surrogate"), ("kernel", "the exact kernel")])
def test_the_log_names_the_kernel_that_has_chosen(solver, kind, caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    solve(build(solver=solver, ridge="auto"), epochs=1)
    (message,) = (m for m in caplog.messages if m.startswith("ridge="))
    assert message.endswith(f"by {kind}")


def chosen_from(path, label, caplog, monkeypatch):
    """What is said when leave-one-out has found this."""
    monkeypatch.setattr(auto_ridge, "KernelSpectrum", lambda *_: None)
    monkeypatch.setattr(auto_ridge, "regularization_path", lambda *_, **__: path)
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = build(solver="cg", ridge="auto")
    fit_on(build_trainer(1), method, TensorData(draw(len(label))[0], torch.tensor(label)))
    return [m for m in caplog.messages if "ridge" in m]


def path_of(accuracy, residual):
    ridges = torch.logspace(-2, 2, 5, dtype=torch.float64)
    empty = torch.zeros(5)
    return RegularizationPath(
        ridges, empty, torch.tensor(residual), torch.tensor(accuracy), None, empty, empty, empty, empty
    )


LABEL = [0, 0, 1, 1, 2, 2]


def test_a_choice_within_the_grid_is_told_without_a_warning(caplog, monkeypatch):
    path = path_of([0.2, 0.3, 0.5, 0.3, 0.2], [5.0, 4.0, 3.0, 4.0, 5.0])
    (message,) = chosen_from(path, LABEL, caplog, monkeypatch)
    assert "chosen by leave-one-out accuracy" in message
    assert "0.500" in message


def test_a_tie_of_all_accuracies_is_told(caplog, monkeypatch):
    path = path_of([0.5] * 5, [5.0, 4.0, 3.0, 4.0, 5.0])
    (message,) = chosen_from(path, LABEL, caplog, monkeypatch)
    assert "chosen by the squared residual, as all leave-one-out accuracies are 0.500" in message


@pytest.mark.parametrize("accuracy", [[0.9, 0.5, 0.4, 0.3, 0.2], [0.2, 0.3, 0.4, 0.5, 0.9]])
def test_the_end_of_the_grid_is_warned_of(accuracy, caplog, monkeypatch):
    told, warning = chosen_from(path_of(accuracy, [1.0] * 5), LABEL, caplog, monkeypatch)
    assert "0.900" in told
    assert "at the end of those that were compared: set method.ridge" in warning


def test_a_class_with_a_single_image_is_warned_of(caplog, monkeypatch):
    path = path_of([0.2, 0.3, 0.5, 0.3, 0.2], [5.0, 4.0, 3.0, 4.0, 5.0])
    _, warning = chosen_from(path, [0, 0, 1, 2, 2], caplog, monkeypatch)
    assert "a class has fewer than two training images" in warning


def test_samples_whose_labels_the_starting_weights_know_have_no_say(monkeypatch):
    judged = torch.arange(SAMPLES) % 4 != 0
    monkeypatch.setattr(auto_ridge, "judged_samples", lambda *_: judged)
    method = build(solver="kernel", ridge="auto")
    solve(method, samples=SAMPLES)
    images, label = draw(SAMPLES)
    rows, start, target = jacobian(images, NAMES), outputs_at_start(images), ALPHA * one_hot(label, 3).double()
    for ridge, press, accuracy in zip(*(getattr(method.path, n) for n in ("ridges", "press", "accuracy")), strict=True):
        outputs = left_out(rows, start, target, float(ridge))[judged]
        assert float(press) == pytest.approx(float((outputs - target[judged]).square().sum()), rel=1e-6)
        right = (outputs.argmax(-1) == label[judged]).double().mean()
        assert float(accuracy) == pytest.approx(float(right), rel=1e-12)
