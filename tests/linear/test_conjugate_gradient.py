import copy
import io
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from linear.dense_ridge import DenseRidge, flat, metric_matrix, near, normal
from lqf_lightning.linear.conjugate_gradient import ConjugateGradient
from lqf_lightning.linear.metric import Metric
from lqf_lightning.linear.problem import QuadraticProblem

EXACT = 1e-10  # relative, float64: a dozen steps on matrices whose condition is about 100
SHAPES = {"weight": torch.Size([4, 5]), "bias": torch.Size([6])}
SIZES = [shape.numel() for shape in SHAPES.values()]
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 0.0, 1.5, 1.0], dtype=torch.float64)

KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weight": WEIGHTS},
    "intercept": {"intercept": True},
    "everything": {"weight": WEIGHTS, "linear": normal(8, 3, seed=5), "intercept": True},
}


def part(vector: Tensor) -> dict[str, Tensor]:
    return {n: v.view(SHAPES[n]) for n, v in zip(SHAPES, vector.split(SIZES), strict=True)}


def zeros() -> dict[str, Tensor]:
    return part(torch.zeros(sum(SIZES), dtype=torch.float64))


def jacobian(outputs: int = 3) -> Tensor:
    """Not centered, the way Jacobians of networks are not."""
    return normal(8, outputs, sum(SIZES), seed=1) + 1.0


def build(kind: str = "plain", outputs: int = 3, ridge: float = 2.0) -> QuadraticProblem:
    parts = {n: v[:, :outputs] if n == "linear" else v for n, v in KINDS[kind].items()}
    return QuadraticProblem(normal(8, outputs, seed=2), 3 * normal(8, outputs, seed=3), ridge, **parts)


def pull(rows: Tensor, descent: ConjugateGradient) -> None:
    descent.receive_gradient(part(torch.einsum("icp,ic->p", rows, descent.residual)))


def steps(descent: ConjugateGradient, rows: Tensor, count: int) -> Iterator[int]:
    """Yields with a fresh gradient: at the start, and after every step."""
    pull(rows, descent)
    yield 0
    for step in range(count):
        descent.receive_image(rows @ flat(descent.direction))
        pull(rows, descent)
        yield step + 1


def run(descent: ConjugateGradient, rows: Tensor, count: int) -> ConjugateGradient:
    for _ in steps(descent, rows, count):
        pass
    return descent


def spd(seed: int) -> Callable[[dict[str, Tensor]], dict[str, Tensor]]:
    root = normal(sum(SIZES), sum(SIZES), seed=seed)
    matrix = root @ root.T / len(root) + 0.1 * torch.eye(len(root), dtype=torch.float64)
    return lambda gradient: part(matrix @ flat(gradient))


@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("weights", [None, {"bias": 7.0, "weight": 0.5}])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_step_tells_the_truth_and_descends_to_the_optimum(kind: str, weights: Any, outputs: int) -> None:
    problem, rows, metric = build(kind, outputs), jacobian(outputs), Metric(weights)
    dense = DenseRidge(problem, rows, metric_matrix(metric, SHAPES))
    optimum = dense.optimum()
    descent, before = ConjugateGradient(problem, zeros(), metric=metric), math.inf
    start = dense.gradient_length(torch.zeros(dense.size, dtype=torch.float64))
    for step in steps(descent, rows, 10):
        moved, certificate = flat(descent.movement), descent.certificate
        assert descent.steps == step
        assert near(descent.outputs, dense.outputs(dense.with_intercept(moved)), EXACT)
        assert (flat(descent.gradient) - dense.gradient(moved)).norm() <= EXACT * start
        assert certificate.relative_gradient == pytest.approx(dense.gradient_length(moved) / start, rel=1e-6, abs=EXACT)
        assert certificate.objective == pytest.approx(dense.objective(moved), rel=EXACT)
        assert certificate.objective <= before + EXACT * abs(certificate.objective)
        distance = dense.length(moved - optimum[: dense.size])
        assert distance <= certificate.distance_bound + EXACT * dense.length(optimum[: dense.size])
        before = certificate.objective
    assert before < dense.objective(torch.zeros(dense.size, dtype=torch.float64))
    run(descent, rows, 60)
    assert near(flat(descent.movement), optimum[: dense.size], EXACT)
    if problem.intercept:
        assert near(descent.intercept, optimum[dense.size :], EXACT)
    else:
        assert torch.equal(descent.intercept, torch.zeros(outputs, dtype=torch.float64))


@pytest.mark.parametrize("kind", list(KINDS))
def test_the_distance_bound_is_sharp_where_all_curvature_is_the_penalty(kind: str) -> None:
    # Outputs that hardly move leave the Hessian at lam M, for which the bound is an equality.
    problem, rows = build(kind), 1e-4 * jacobian()
    dense, descent = DenseRidge(problem, rows), ConjugateGradient(problem, zeros())
    pull(rows, descent)
    assert descent.certificate.distance_bound == pytest.approx(dense.length(dense.optimum()[: dense.size]), rel=1e-4)


def test_without_preconditioner_these_are_textbook_conjugate_gradients() -> None:
    # Centered, since a single large eigenvalue lets rounding grow tenfold or more with every step.
    problem, rows = build(), jacobian() - 1.0
    dense = DenseRidge(problem, rows)
    x = torch.zeros(dense.size, dtype=torch.float64)
    residual = direction = dense.right
    descent, directions = ConjugateGradient(problem, zeros()), []
    for step in steps(descent, rows, 8):
        assert descent.steps == step
        assert near(flat(descent.movement), x, EXACT)
        directions.append(flat(descent.direction))
        image = dense.hessian @ direction
        length = residual @ residual / (direction @ image)
        x, left = x + length * direction, residual - length * image
        direction, residual = left + (left @ left) / (residual @ residual) * direction, left
    found = torch.stack(directions)
    products = found @ dense.hessian @ found.T
    scale = products.diagonal().sqrt()
    assert ((products / scale / scale[:, None]) - torch.eye(len(found))).abs().max() < 1e-8


def test_an_eliminated_intercept_leaves_conjugate_gradients_on_centered_jacobians() -> None:
    problem, rows = build("intercept"), jacobian()
    centered = problem.with_(intercept=False, target=problem.target - problem.residual.mean(0))
    one, other = ConjugateGradient(problem, zeros()), ConjugateGradient(centered, zeros())
    for _ in zip(steps(one, rows, 6), steps(other, rows - rows.mean(0), 6), strict=True):
        assert (flat(one.movement) - flat(other.movement)).norm() <= EXACT * 10
        assert (flat(one.direction) - flat(other.direction)).norm() <= EXACT * flat(one.direction).norm()


@pytest.mark.parametrize("weights", [None, {"bias": 7.0}])
@pytest.mark.parametrize("seed", [0, 1])
def test_any_preconditioner_leads_to_the_same_optimum(seed: int, weights: Any) -> None:
    problem, rows, metric = build("everything"), jacobian(), Metric(weights)
    dense = DenseRidge(problem, rows, metric_matrix(metric, SHAPES))
    descent = run(ConjugateGradient(problem, zeros(), metric=metric, precondition=spd(seed)), rows, 60)
    assert near(flat(descent.movement), dense.optimum()[: dense.size], EXACT)


def test_the_metric_is_the_preconditioner_unless_another_is_given() -> None:
    metric, rows = Metric({"bias": 7.0}), jacobian()
    one = ConjugateGradient(build(), zeros(), metric=metric)
    other = ConjugateGradient(build(), zeros(), metric=metric, precondition=metric.solve)
    assert torch.equal(flat(run(one, rows, 3).movement), flat(run(other, rows, 3).movement))
    # In the units in which the metric is the identity these are the same steps.
    root = torch.cat([
        torch.ones(SIZES[0], dtype=torch.float64),
        torch.full((SIZES[1],), 7.0**0.5, dtype=torch.float64),
    ])
    plain = run(ConjugateGradient(build(), zeros()), rows / root, 3)
    assert near(flat(one.movement), flat(plain.movement) / root, EXACT)


def test_the_exact_inverse_for_a_preconditioner_takes_one_step() -> None:
    problem, rows = build("weighted"), jacobian()
    dense = DenseRidge(problem, rows)
    exact = lambda gradient: part(torch.linalg.solve(dense.hessian, flat(gradient)))  # noqa: E731
    descent = run(ConjugateGradient(problem, zeros(), precondition=exact), rows, 1)
    assert near(flat(descent.movement), dense.optimum(), EXACT)
    assert descent.certificate.relative_gradient < EXACT


def test_a_preconditioner_that_changes_from_call_to_call_is_forgiven() -> None:
    problem, rows = build(), jacobian()
    draw = torch.Generator().manual_seed(0)

    def noisy(gradient: dict[str, Tensor]) -> dict[str, Tensor]:
        return {n: g * (0.5 + torch.rand(g.shape, generator=draw, dtype=g.dtype)) for n, g in gradient.items()}

    descent = ConjugateGradient(problem, zeros(), precondition=noisy)
    values = [descent.certificate.objective for _ in steps(descent, rows, 150)]
    assert all(after <= before + EXACT * abs(before) for before, after in itertools.pairwise(values))
    assert descent.certificate.relative_gradient < 1e-8


@pytest.mark.parametrize("kind", list(KINDS))
def test_coefficients_reproduce_the_movement_up_to_the_certified_distance(kind: str) -> None:
    problem, rows, metric = build(kind), jacobian(), Metric({"bias": 7.0})
    dense, descent = (
        DenseRidge(problem, rows, metric_matrix(metric, SHAPES)),
        ConjugateGradient(problem, zeros(), metric=metric),
    )

    def gap() -> float:
        solution = descent.solution()
        assert solution.coefficients is not None
        assert solution.direction is not None
        if problem.intercept:
            assert solution.coefficients.sum(0).abs().max() < EXACT * solution.coefficients.norm()
        pulled = torch.einsum("icp,ic->p", rows, solution.coefficients)
        return dense.length(flat(solution.direction) - torch.linalg.solve(dense.metric, pulled))

    for _ in steps(descent, rows, 4):
        assert gap() == pytest.approx(descent.certificate.distance_bound, rel=1e-9)
    run(descent, rows, 40)
    assert gap() <= EXACT * dense.length(flat(descent.movement))


def test_a_solution_holds_the_present_point() -> None:
    problem, rows = build("everything"), jacobian()
    descent = run(ConjugateGradient(problem, zeros()), rows, 3)
    solution = descent.solution()
    assert solution.direction is not None
    kept, certificate = flat(solution.direction).clone(), solution.certificate
    assert torch.equal(kept, flat(descent.movement))
    assert torch.equal(solution.outputs, descent.outputs)
    assert torch.equal(solution.intercept, descent.intercept)
    assert certificate == descent.certificate
    run(descent, rows, 2)
    assert torch.equal(flat(solution.direction), kept)
    assert not torch.equal(flat(descent.movement), kept)


def test_nothing_to_explain_means_no_step() -> None:
    problem = build().with_(target=build().initial)
    descent = ConjugateGradient(problem, zeros())
    pull(jacobian(), descent)
    assert descent.certificate == type(descent.certificate)(0.0, 0.0, 0.0)
    descent.receive_image(jacobian() @ flat(descent.direction))
    pull(jacobian(), descent)
    assert torch.equal(flat(descent.movement), flat(zeros()))
    assert descent.certificate.relative_gradient == 0.0


def test_steps_at_the_optimum_do_no_harm() -> None:
    problem, rows = build(), jacobian()
    descent = run(ConjugateGradient(problem, zeros()), rows, 200)
    assert near(flat(descent.movement), DenseRidge(problem, rows).optimum(), EXACT)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_an_error(value: float) -> None:
    descent, gradient = ConjugateGradient(build(), zeros()), zeros()
    gradient["bias"][2] = value
    with pytest.raises(FloatingPointError, match="not finite"):
        descent.receive_gradient(gradient)


def test_other_names_in_a_gradient_are_ignored() -> None:
    rows, seen = jacobian(), ConjugateGradient(build(), zeros())
    seen.receive_gradient({**part(torch.ones(26, dtype=torch.float64)), "head": torch.ones(3)})
    assert set(seen.direction) == set(SHAPES)
    seen.receive_image(rows @ flat(seen.direction))
    assert set(seen.movement) == set(SHAPES)


@pytest.mark.parametrize("halfway", [False, True])
def test_an_interrupted_descent_goes_on_bit_by_bit(halfway: bool) -> None:
    problem, rows, metric = build("everything"), jacobian(), Metric({"bias": 7.0})
    descent = run(ConjugateGradient(problem, zeros(), metric=metric, precondition=spd(0)), rows, 4)
    if halfway:
        descent.receive_image(rows @ flat(descent.direction))
    state, buffer = descent.state(), io.BytesIO()
    frozen = copy.deepcopy(state)
    torch.save(state, buffer)
    buffer.seek(0)
    other = ConjugateGradient(problem, zeros(), metric=metric, precondition=spd(0))
    other.restore(torch.load(buffer, weights_only=True), descent.image)
    assert other.steps == descent.steps
    if not halfway:
        assert other.certificate == descent.certificate
        for each in (descent, other):
            each.receive_image(rows @ flat(each.direction))
    for _ in zip(steps(descent, rows, 3), steps(other, rows, 3), strict=True):
        assert torch.equal(flat(other.movement), flat(descent.movement))
        assert torch.equal(flat(other.direction), flat(descent.direction))
        assert other.certificate == descent.certificate
        assert other.steps == descent.steps
    for name, kept in frozen.items():
        same = state[name]
        assert torch.equal(flat(same), flat(kept)) if isinstance(kept, dict) else same == kept  # type: ignore[arg-type]


def test_a_descent_may_start_anywhere() -> None:
    problem, rows = build("everything"), jacobian()
    dense, start = DenseRidge(problem, rows), part(normal(26, seed=9))
    cold = run(ConjugateGradient(problem, zeros()), rows, 0)
    descent = ConjugateGradient(problem, start, image=rows @ flat(start), reference=cold.reference)
    pull(rows, descent)
    assert descent.certificate.objective == pytest.approx(dense.objective(flat(start)), rel=EXACT)
    first = dense.gradient_length(torch.zeros(26, dtype=torch.float64))
    relative = dense.gradient_length(flat(start)) / first
    assert descent.certificate.relative_gradient == pytest.approx(relative, rel=EXACT)
    run(descent, rows, 60)
    assert near(flat(descent.movement), dense.optimum()[:26], EXACT)
    assert torch.equal(flat(start), normal(26, seed=9))


def test_without_a_reference_the_start_is_the_reference() -> None:
    rows, start = jacobian(), part(normal(26, seed=9))
    descent = ConjugateGradient(build(), start, image=rows @ flat(start))
    pull(rows, descent)
    assert descent.certificate.relative_gradient == 1.0


def test_a_start_without_its_image_is_refused() -> None:
    with pytest.raises(ValueError, match="image `J dw` must be given"):
        ConjugateGradient(build(), part(normal(26)))


def test_no_certificate_without_the_gradient_of_the_present_point() -> None:
    rows, descent = jacobian(), ConjugateGradient(build(), zeros())
    with pytest.raises(RuntimeError, match="call `receive_gradient`"):
        _ = descent.certificate
    pull(rows, descent)
    descent.receive_image(rows @ flat(descent.direction))
    with pytest.raises(RuntimeError, match="call `receive_gradient`"):
        descent.solution()


def test_images_computed_anew_bring_back_the_truth() -> None:
    problem, rows = build("everything"), jacobian()
    dense, descent = DenseRidge(problem, rows), run(ConjugateGradient(problem, zeros()), rows, 3)
    descent.image += 1e-3 * normal(8, 3, seed=11)  # what rounding adds up to
    pull(rows, descent)
    truth = dense.gradient_length(flat(descent.movement)) / problem.ridge
    assert descent.certificate.distance_bound != pytest.approx(truth, rel=1e-4)
    descent.renew_image(rows @ flat(descent.movement))
    with pytest.raises(RuntimeError, match="call `receive_gradient`"):
        _ = descent.certificate
    pull(rows, descent)
    assert descent.certificate.distance_bound == pytest.approx(truth, rel=EXACT)
    run(descent, rows, 60)
    assert near(flat(descent.movement), dense.optimum()[:26], EXACT)


def test_where_the_rule_would_turn_back_the_descent_starts_afresh() -> None:
    descent, gradient = ConjugateGradient(build(), zeros()), normal(26)
    descent.receive_gradient(part(gradient))
    descent.receive_gradient(part(0.5 * gradient))
    assert torch.equal(flat(descent.direction), -0.5 * gradient)
