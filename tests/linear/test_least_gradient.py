"""Checked against the conjugate residual method, and against gradients computed anew."""

import pytest
import torch

from lqf_lightning.linear import ConjugateGradient, Metric, QuadraticProblem
from lqf_lightning.linear.least_gradient import LeastGradient

SAMPLES, OUTPUTS, PARAMETERS, RIDGE = 9, 2, 12, 0.3


def problem_and_rows(intercept):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(SAMPLES * OUTPUTS, PARAMETERS, generator=draw, dtype=torch.float64)
    target = torch.randn(SAMPLES, OUTPUTS, generator=draw, dtype=torch.float64)
    return QuadraticProblem(torch.zeros_like(target), target, RIDGE, intercept=intercept), rows


def pull(rows, residual):
    return {"w": rows.T @ residual.flatten()}


def steps_of(descent, rows, number):
    descent.receive_gradient(pull(rows, descent.residual))
    least = LeastGradient(descent)
    yield least
    for _ in range(number):
        descent.receive_image((rows @ descent.direction["w"]).reshape(SAMPLES, OUTPUTS))
        descent.receive_gradient(pull(rows, descent.residual))
        least.update()
        yield least


def test_combinations_are_the_points_of_conjugate_residuals():
    problem, rows = problem_and_rows(intercept=False)
    matrix = rows.T @ rows + RIDGE * torch.eye(PARAMETERS, dtype=torch.float64)
    right = rows.T @ problem.target.flatten()
    descent = ConjugateGradient(problem, {"w": torch.zeros(PARAMETERS, dtype=torch.float64)})
    basis = [right]
    for number, least in enumerate(steps_of(descent, rows, 5)):
        if number:
            krylov = torch.linalg.qr(torch.stack(basis, 1)).Q
            best = krylov @ torch.linalg.lstsq(matrix @ krylov, right).solution
            assert torch.allclose(least.movement["w"], best, rtol=0, atol=1e-9 * float(best.norm()))
            basis.append(matrix @ basis[-1] / matrix.norm())


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("weight", [1.0, 2.5])
def test_gradient_is_that_of_the_combination_and_its_norm_never_rises(intercept, weight):
    problem, rows = problem_and_rows(intercept)
    metric, before = Metric({"w": weight}), float("inf")
    descent = ConjugateGradient(problem, {"w": torch.zeros(PARAMETERS, dtype=torch.float64)}, metric=metric)
    for least in steps_of(descent, rows, 6):
        movement = dict(least.movement)
        anew = ConjugateGradient(
            problem, movement, metric=metric, image=(rows @ movement["w"]).reshape(SAMPLES, OUTPUTS)
        )
        anew.receive_gradient(pull(rows, anew.residual))
        bound = least.certificate.distance_bound
        assert bound == pytest.approx(anew.certificate.distance_bound, rel=1e-9, abs=1e-12)
        assert bound <= before * (1 + 1e-12)
        assert bound <= descent.certificate.distance_bound * (1 + 1e-12)
        before = bound


def test_point_that_does_not_move_stays():
    problem, rows = problem_and_rows(intercept=False)
    descent = ConjugateGradient(problem, {"w": torch.zeros(PARAMETERS, dtype=torch.float64)})
    descent.receive_gradient(pull(rows, descent.residual))
    least = LeastGradient(descent)
    least.update()
    assert torch.equal(least.movement["w"], descent.movement["w"])
    assert least.certificate.relative_gradient == pytest.approx(1.0)
