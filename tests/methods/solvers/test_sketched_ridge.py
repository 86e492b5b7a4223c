import logging
import math

import pytest
import torch
from torch.nn.functional import one_hot

from lqf_lightning.linear import QuadraticProblem, ridge_of_mean
from lqf_lightning.linear.held_out_gradient import held_out_gradient
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.methods.solvers import acceleration
from lqf_lightning.methods.solvers.sketched_ridge import settle_ridge_by_sketch
from lqf_lightning.methods.solvers.training_table import TrainingTable
from methods.dense_lqf import ALPHA, build, flat, jacobian, outputs_at_start
from methods.solvers.runs import solve
from methods.solvers.test_auto_ridge import NAMES
from methods.solvers.test_settle_penalty import factors, optimum
from methods.tensors import TensorData, build_trainer, draw, fit_on

SAMPLES = 24
LEARNED = {"ridge": "auto", "metric": "learned", "solver": "cg"}


@pytest.fixture
def sketched(monkeypatch):
    monkeypatch.setattr(acceleration, "_LARGE", math.inf)


def test_the_run_solves_with_the_ridge_of_the_model_itself(sketched, caplog):
    caplog.set_level(logging.INFO, "lqf_lightning")
    method = build(tolerance=1e-9, **LEARNED)
    solve(method, samples=SAMPLES)
    assert any("of the model itself, on 24 images by a sketch" in text for text in caplog.messages)
    wanted = optimum(method)
    assert (flat(method.linearized.deltas) - wanted).norm() < 1e-6 * wanted.norm()


def test_a_resumed_run_keeps_it(sketched, tmp_path, monkeypatch):
    first = build(tolerance=1e-9, **LEARNED)
    solve(first, samples=SAMPLES, epochs=2).save_checkpoint(tmp_path / "run.ckpt")
    monkeypatch.setattr(acceleration, "settle_ridge_by_sketch", lambda *_: pytest.fail("the ridge has been chosen"))
    second = build(tolerance=1e-9, **LEARNED)
    solve(second, samples=SAMPLES, ckpt_path=tmp_path / "run.ckpt", weights_only=True)
    assert (second.ridge, second.relative_ridge) == (first.ridge, first.relative_ridge)


def test_with_exact_rows_no_other_ridge_is_better():
    images, label = draw(SAMPLES)
    images = images + 0.6 * torch.eye(3, dtype=torch.float64)[label][:, :, None, None]  # classes that can be told apart
    method = build(tolerance=1e-9, **LEARNED)
    fit_on(build_trainer(1), method, TensorData(images, label, 4))
    scale = torch.where(factors(method) > 0, factors(method).clamp_min(1e-300).rsqrt(), 0.0)
    rows, table = jacobian(images, NAMES) * scale, TrainingTable.collect(method)
    settle_ridge_by_sketch(method, table, rows)
    problem = QuadraticProblem(outputs_at_start(images), ALPHA * one_hot(label, 3).double(), 1.0, intercept=True)
    whole = rows.flatten(0, 1) @ rows.flatten(0, 1).T

    def loss(ridge):
        return held_out_gradient(problem.with_(ridge=ridge), Kernel({"all": whole[None]}, 3), {"all": 1.0}).loss

    chosen = ridge_of_mean(method.ridge, SAMPLES)
    losses = [loss(factor * chosen) for factor in (0.1, 0.3, 3.0, 10.0)]
    assert max(losses) > loss(chosen) + 0.01  # it matters
    assert min(losses) > loss(chosen) - 2e-3


def test_images_that_cannot_judge_leave_the_ridge_as_it_is(caplog):
    caplog.set_level(logging.WARNING, "lqf_lightning")
    method = build(tolerance=1e-9, acceleration="sketch", **LEARNED)
    solve(method, samples=3, epochs=1)  # one of each class: nothing can be learned
    assert any("cannot judge another" in text for text in caplog.messages)
    assert method.ridge * 3 == pytest.approx(method.learned_penalty.ridge)
