import math

import pytest
import torch

from lqf_lightning.forgetting.ntk_scrub import ntk_movement, trapezium_scale
from lqf_lightning.linear import Kernel, QuadraticProblem

SAMPLES, OUTPUTS, WEIGHTS, RIDGE = 8, 2, 30, 0.7
FORGOTTEN = torch.tensor([6, 1, 4])


def build(intercept=False, weighted=False):
    draw = torch.Generator().manual_seed(0)
    rows = torch.randn(SAMPLES, OUTPUTS, WEIGHTS, generator=draw, dtype=torch.float64)
    initial, target = torch.randn(2, SAMPLES, OUTPUTS, generator=draw, dtype=torch.float64)
    weight = torch.rand(SAMPLES, generator=draw, dtype=torch.float64) + 0.5 if weighted else None
    flat = rows.flatten(0, 1)
    kernel = Kernel({"all": (flat @ flat.T)[None]}, OUTPUTS, "full")
    return rows, QuadraticProblem(initial, target, RIDGE, weight, intercept=intercept), kernel


def optimum(rows, problem, kept, ridge):
    """Weights and intercept by the normal equations."""
    columns = [rows]
    if problem.intercept:
        columns.append(torch.eye(OUTPUTS, dtype=torch.float64).expand(len(rows), -1, -1))
    whole = torch.cat(columns, 2)[kept] * problem.root_weight[kept, :, None]
    flat = whole.flatten(0, 1)
    penalty = torch.zeros(flat.shape[1], dtype=torch.float64)
    penalty[:WEIGHTS] = ridge
    side = (problem.residual * problem.root_weight)[kept].flatten()
    return torch.linalg.solve(flat.T @ flat + torch.diag(penalty), flat.T @ side)


def moved(rows, movement):
    return torch.einsum("ncp,nc->p", rows, movement.coefficients)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("retained_ridge", [RIDGE, RIDGE * 5 / 8])
def test_the_movement_is_the_difference_of_two_ridge_solutions(intercept, weighted, retained_ridge):
    rows, problem, kernel = build(intercept, weighted)
    kept = torch.tensor([i for i in range(SAMPLES) if i not in FORGOTTEN.tolist()])
    every = optimum(rows, problem, torch.arange(SAMPLES), RIDGE)
    rest = optimum(rows, problem, kept, retained_ridge)
    movement = ntk_movement(problem, kernel, FORGOTTEN, retained_ridge=retained_ridge)
    torch.testing.assert_close(moved(rows, movement), (rest - every)[:WEIGHTS], rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(
        torch.einsum("ncp,nc->p", rows, movement.retained), rest[:WEIGHTS], rtol=1e-9, atol=1e-11
    )
    if intercept:
        torch.testing.assert_close(movement.intercept, (rest - every)[WEIGHTS:], rtol=1e-9, atol=1e-11)


def test_with_one_ridge_it_has_the_block_form_with_a_minus_in_front_of_the_retained_residual():
    rows, problem, kernel = build()
    kept = torch.tensor([i for i in range(SAMPLES) if i not in FORGOTTEN.tolist()])
    stay, gone = rows[kept].flatten(0, 1), rows[FORGOTTEN].flatten(0, 1)
    theta_rr = stay @ stay.T + RIDGE * torch.eye(len(stay), dtype=torch.float64)
    theta_ff = gone @ gone.T + RIDGE * torch.eye(len(gone), dtype=torch.float64)
    theta_fr = gone @ stay.T
    inverse = torch.linalg.inv(theta_rr)
    project = torch.eye(WEIGHTS, dtype=torch.float64) - stay.T @ inverse @ stay
    schur = torch.linalg.inv(theta_ff - theta_fr @ inverse @ theta_fr.T)
    own, others = problem.residual[FORGOTTEN].flatten(), theta_fr @ inverse @ problem.residual[kept].flatten()
    movement = moved(rows, ntk_movement(problem, kernel, FORGOTTEN, retained_ridge=RIDGE))
    torch.testing.assert_close(movement, -project @ gone.T @ schur @ (own - others), rtol=1e-10, atol=1e-11)
    assert float((movement + project @ gone.T @ schur @ (own + others)).norm()) > 0.1 * float(movement.norm())


@pytest.mark.parametrize("positions", [[], [0, 0], [SAMPLES], [-1], list(range(SAMPLES))])
def test_positions_that_make_no_cohort_are_refused(positions):
    _, problem, kernel = build()
    with pytest.raises(ValueError, match="different positions"):
        ntk_movement(problem, kernel, torch.tensor(positions, dtype=torch.int64), retained_ridge=RIDGE)


def test_the_long_base_of_an_isosceles_trapezium_is_found_from_its_legs():
    # Short base of 3 along an axis; legs of length 5 that lean outwards by an angle.
    angle = 0.4
    leg = {"a": torch.tensor([5 * math.cos(angle)]), "b": torch.tensor([5 * math.sin(angle)])}
    base = {"a": torch.tensor([3.0]), "b": torch.tensor([0.0])}
    long = 3 + 2 * 5 * math.cos(angle)
    assert trapezium_scale(base, leg) * 3 == pytest.approx(long, rel=1e-6)
    assert trapezium_scale(base, {name: -entry for name, entry in leg.items()}) * 3 == pytest.approx(long, rel=1e-6)


def test_where_nothing_moves_nothing_is_lengthened():
    assert trapezium_scale({"a": torch.zeros(2)}, {"a": torch.ones(2)}) == 1.0
