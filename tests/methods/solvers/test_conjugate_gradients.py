import logging
from functools import partial

import pytest
import torch

from lqf_lightning.linear import CoefficientDescent, fit_kfac
from methods.dense_lqf import ALPHA, build, flat, jacobian, outputs_at_start, scatter_deltas
from methods.solvers.runs import Note, dense, solve
from methods.tensors import TensorData, build_trainer, draw, fit_on

KFAC = partial(fit_kfac, cotangents="random")
TIGHT = {"solver": "cg", "tolerance": 1e-12, "ridge": 0.02}
LOGGED = ("relative_gradient", "distance_bound", "objective")


def metric_of(kfac, method):
    """K-FAC's curvature with its damping, as a matrix over dw, zero for the intercept."""
    deltas = {n: d.detach() for n, d in method.linearized.deltas.items()}
    columns = []
    for vector in torch.eye(sum(d.numel() for d in deltas.values()), dtype=torch.float64):
        parts = vector.split([d.numel() for d in deltas.values()])
        entries = {n: part.view(d.shape) for (n, d), part in zip(deltas.items(), parts, strict=True)}
        moved = kfac.multiply({n: e for n, e in entries.items() if n in kfac.names}, damping=method.ridge)
        columns.append(flat({n: moved.get(n, torch.zeros_like(d)) for n, d in deltas.items()}))
    return torch.stack(columns, 1)


@pytest.mark.parametrize(
    ("options", "factors"),
    [
        ({}, None),
        ({"preconditioner": KFAC, "acceleration": "kfac"}, None),
        ({"acceleration": "sketch"}, None),
        ({"acceleration": "sketch", "group_ridge": {"stem": 10.0}}, {"stem": 10.0}),
        ({"preconditioner": KFAC, "acceleration": "kfac", "preconditioner_samples": 5}, None),
        ({"group_ridge": {"stem": 10.0, "head": 0.3}}, {"stem": 10.0, "head": 0.3}),
        ({"group_ridge": {"stem": 10.0}, "preconditioner": KFAC}, {"stem": 10.0}),
        ({"layers": ["head"]}, None),
        ({"layers": ["stage1"]}, None),
        ({"layers": ["stage1"], "preconditioner": KFAC}, None),
        ({"intercept": False}, None),
        ({"intercept": False, "preconditioner": KFAC, "group_ridge": {"head": 2.0}}, {"head": 2.0}),
    ],
)
def test_it_ends_at_the_solution_of_the_normal_equations(options, factors):
    method = build(**TIGHT, **options)
    solve(method)
    expected = dense(method, factors=factors).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()


def test_curvature_as_the_metric():
    method = build(**TIGHT, metric="kfac", preconditioner=KFAC)
    solve(method)
    kfac = method.solver.descent.metric.kfac
    problem = dense(method, metric=metric_of(kfac, method))
    expected, plain = problem.optimum(), dense(method).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()
    assert (expected - plain).norm() > 1e-2 * plain.norm()


@pytest.mark.parametrize(
    "options",
    [{"acceleration": "none"}, {"preconditioner": KFAC, "acceleration": "kfac"}, {"group_ridge": {"stem": 3.0}}],
)
def test_logged_certificates_are_those_of_the_dense_problem(options):
    note, method = Note(), build(**TIGHT, **options)
    solve(method, epochs=5, callbacks=[note])
    problem = dense(method, factors={"stem": 3.0} if "group_ridge" in options else None)
    reference, optimum = problem.gradient_length(torch.zeros(len(problem.hessian)).double()), problem.optimum()
    for row, dw, certificate in zip(note.rows, note.deltas, note.certificates, strict=True):
        gradient = problem.gradient_length(dw)
        wanted = (gradient / reference, gradient / problem.ridge, problem.objective(dw))
        assert [getattr(certificate, name) for name in LOGGED] == pytest.approx(wanted, rel=1e-9)
        assert [row[f"train/{name}"] for name in LOGGED] == pytest.approx(wanted, rel=1e-6)
        assert problem.length(dw - optimum) <= certificate.distance_bound
    objectives = [certificate.objective for certificate in note.certificates]
    assert objectives == sorted(objectives, reverse=True)


def test_training_loss_and_accuracy_are_those_of_the_weights_after_the_epoch():
    note, method, (images, target) = Note(), build(**TIGHT), draw(11)
    solve(method, epochs=3, callbacks=[note])
    for row, dw in zip(note.rows, note.deltas, strict=True):
        outputs = outputs_at_start(images) + jacobian(images, list(method.linearized.deltas)) @ dw
        error = outputs - ALPHA * torch.eye(3, dtype=torch.float64)[target]
        assert row["train/loss"] == pytest.approx(error.square().sum().item() / 22, rel=1e-6)
        assert row["train/acc"] == pytest.approx((outputs.argmax(-1) == target).double().mean().item(), rel=1e-6)


def test_without_a_preconditioner_steps_are_those_of_conjugate_gradients_on_the_normal_equations():
    note, method = Note(), build(**TIGHT, intercept=False, acceleration="none")
    solve(method, epochs=4, callbacks=[note])
    problem = dense(method)
    point = torch.zeros(len(problem.hessian), dtype=torch.float64)
    residual = problem.hessian @ problem.optimum()
    direction = residual
    for dw in note.deltas:  # Hestenes and Stiefel
        length = residual @ residual / (direction @ problem.hessian @ direction)
        point, before = point + length * direction, residual
        residual = residual - length * problem.hessian @ direction
        direction = residual + (residual @ residual) / (before @ before) * direction
        assert torch.allclose(dw, point, rtol=1e-8, atol=1e-10)


def test_it_stops_when_the_certificate_is_good_enough(caplog):
    caplog.set_level(logging.WARNING, "lqf_lightning")
    note, method = Note(), build(solver="cg", ridge=0.02, tolerance=1e-2)
    trainer = solve(method, callbacks=[note])
    reached = [certificate.relative_gradient for certificate in note.certificates]
    assert reached[-1] <= 1e-2 < min(reached[:-1])
    assert trainer.current_epoch == len(reached) == trainer.global_step
    assert not caplog.messages


def test_it_says_how_far_the_optimum_is_when_the_epochs_are_used_up(caplog):
    caplog.set_level(logging.WARNING, "lqf_lightning")
    solve(build(**TIGHT), epochs=2)
    (message,) = caplog.messages
    assert "stopped above tolerance=1e-12" in message
    assert "its own length is" in message
    assert message.endswith("Set trainer.max_epochs higher")


def test_the_batch_size_plays_no_part():
    results = []
    for size in (1, 4, 11):
        method = build(**TIGHT, preconditioner=KFAC)
        solve(method, batch_size=size, epochs=8)
        results.append(flat(method.linearized.deltas))
    for other in results[1:]:
        assert (other - results[0]).norm() < 1e-10 * results[0].norm()


def test_training_moves_dw_by_one_step_of_the_optimizer_per_epoch_and_nothing_else():
    method = build(**TIGHT, layers=["stage1", "head"])
    before = {name: value.clone() for name, value in method.state_dict().items()}
    trainer = solve(method, epochs=3)
    moved = {name for name, value in method.state_dict().items() if not torch.equal(before[name], value)}
    names = ("conv2.weight", "bn2.weight", "bn2.bias", "fc.weight", "fc.bias")
    assert moved == {f"linearized.dw.{name}" for name in names}
    assert trainer.global_step == 3


def test_another_start_ends_at_the_same_point_with_certificates_relative_to_the_pre_trained_weights():
    method = build(**TIGHT)
    scatter_deltas(method)
    note = Note()
    solve(method, callbacks=[note])
    problem = dense(method)
    expected = problem.optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()
    reference = problem.gradient_length(torch.zeros_like(expected))
    wanted = problem.gradient_length(note.deltas[0]) / reference
    assert note.certificates[0].relative_gradient == pytest.approx(wanted, rel=1e-9)


@pytest.mark.parametrize("options", [{}, {"preconditioner": KFAC, "acceleration": "kfac"}])
@pytest.mark.parametrize("stop", [1, 2, 5])
def test_an_interrupted_run_goes_on_bit_by_bit(options, stop, tmp_path):
    whole, first, second = (build(**TIGHT, **options) for _ in range(3))
    solve(whole, epochs=7)
    solve(first, epochs=stop).save_checkpoint(tmp_path / "run.ckpt")
    trainer = solve(second, epochs=7, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert trainer.global_step == 7
    assert torch.equal(flat(second.linearized.deltas), flat(whole.linearized.deltas))
    assert second.solver.certificate == whole.solver.certificate


def test_a_run_that_has_arrived_is_not_gone_on_with(tmp_path):
    options = {"solver": "cg", "tolerance": 1e-2, "ridge": 0.02}
    first, second = build(**options), build(**options)
    solve(first).save_checkpoint(tmp_path / "run.ckpt")
    steps = first.solver.descent.steps
    solve(second, epochs=300, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert second.solver.descent.steps == steps
    third = build(**options | {"tolerance": 1e-6})  # a better optimum is wanted
    solve(third, epochs=300, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert third.solver.descent.steps > steps
    assert third.solver.certificate.relative_gradient <= 1e-6


@pytest.mark.parametrize(
    ("options", "data"),
    [({"ridge": 0.2}, {}), ({"group_ridge": {"stem": 4.0}}, {}), ({}, {"seed": 2}), ({}, {"samples": 9})],
)
def test_another_problem_is_started_anew_from_the_weights_of_the_checkpoint(options, data, tmp_path, caplog):
    solve(build(**TIGHT), epochs=6).save_checkpoint(tmp_path / "run.ckpt")
    caplog.set_level(logging.WARNING, "lqf_lightning")
    method = build(**TIGHT | options)
    solve(method, **data, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert any("have changed" in message for message in caplog.messages)
    expected = dense(method, factors=options.get("group_ridge"), **data).optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-9 * expected.norm()


def test_a_sketch_takes_few_steps_and_tells_the_truth_after_each():
    note, method, plain = Note(), build(**TIGHT, acceleration="sketch"), build(**TIGHT, acceleration="none")
    solve(method, callbacks=[note])
    solve(plain)
    assert isinstance(method.solver.descent, CoefficientDescent)
    assert method.solver.descent.steps < plain.solver.descent.steps
    problem = dense(method)
    reference, optimum = problem.gradient_length(torch.zeros(len(problem.hessian)).double()), problem.optimum()
    assert (flat(method.linearized.deltas) - optimum).norm() < 1e-8 * optimum.norm()
    for dw, certificate in zip(note.deltas, note.certificates, strict=True):
        gradient = problem.gradient_length(dw)
        assert certificate.relative_gradient == pytest.approx(gradient / reference, rel=1e-6, abs=1e-12)
        assert certificate.objective == pytest.approx(problem.objective(dw), rel=1e-9)
        assert problem.length(dw - optimum) <= certificate.distance_bound + 1e-12 * problem.length(optimum)


@pytest.mark.parametrize("options", [{"intercept": False}, {"group_ridge": {"stem": 10.0}}, {"layers": ["stage1"]}])
def test_a_sketched_run_that_is_interrupted_goes_on_bit_by_bit(options, tmp_path):
    options = TIGHT | {"acceleration": "sketch"} | options
    whole, first, second = (build(**options) for _ in range(3))
    solve(whole, epochs=6)
    solve(first, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    solve(second, epochs=6, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert torch.equal(flat(second.linearized.deltas), flat(whole.linearized.deltas))
    assert torch.equal(second.solver.descent.coefficients, whole.solver.descent.coefficients)
    assert second.solver.certificate == whole.solver.certificate


@pytest.mark.parametrize("kinds", [("sketch", "none"), ("none", "sketch")])
def test_another_acceleration_is_started_anew(kinds, tmp_path, caplog):
    first, second = (build(**TIGHT, acceleration=kind) for kind in kinds)
    solve(first, epochs=3).save_checkpoint(tmp_path / "run.ckpt")
    caplog.set_level(logging.WARNING, "lqf_lightning")
    solve(second, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert any("have changed" in message for message in caplog.messages)
    expected = dense(second).optimum()
    assert (flat(second.linearized.deltas) - expected).norm() < 1e-8 * expected.norm()


def test_images_that_are_not_finite_end_the_run():
    images, target = draw(6)
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(ValueError, match="not finite; check the images"):
        fit_on(build_trainer(2), build(**TIGHT), TensorData(images, target))
