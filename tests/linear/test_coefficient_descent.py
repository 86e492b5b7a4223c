import copy
import io
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from linear.dense_ridge import DenseRidge, flat, metric_matrix, near, network_jacobian, normal
from linear.nets import build_net
from lqf_lightning.linear import LinearizedModel, current_reducer, fit_kfac
from lqf_lightning.linear.coefficient_descent import CoefficientDescent
from lqf_lightning.linear.conjugate_gradient import ConjugateGradient
from lqf_lightning.linear.dual_precondition import DualPrecondition
from lqf_lightning.linear.jacobian import StreamedJacobian
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.metric import KroneckerMetric, Metric
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.row_sketch import sketch_rows
from lqf_lightning.linear.solve_cg import solve_cg
from ranks import run_on_ranks

EXACT = 1e-9  # relative, float64
SHAPES = {"weight": torch.Size([7, 5]), "bias": torch.Size([6])}
SIZES = [shape.numel() for shape in SHAPES.values()]
COUNT = sum(SIZES)
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0, 0.0, 1.5, 1.0], dtype=torch.float64)
METRIC = Metric({"bias": 7.0, "weight": 0.5})
KINDS: dict[str, dict[str, Any]] = {
    "plain": {},
    "weighted": {"weight": WEIGHTS},
    "intercept": {"intercept": True},
    "both": {"weight": WEIGHTS, "intercept": True},
}
Inverse = Callable[[Tensor], Tensor]


def part(vector: Tensor) -> dict[str, Tensor]:
    return {n: v.view(SHAPES[n]) for n, v in zip(SHAPES, vector.split(SIZES), strict=True)}


def jacobian() -> Tensor:
    """Fewer rows than columns, not centered."""
    return normal(8, 3, COUNT, seed=1) + 1.0


def build(kind: str = "plain", ridge: float = 2.0) -> QuadraticProblem:
    return QuadraticProblem(normal(8, 3, seed=2), 3 * normal(8, 3, seed=3), ridge, **KINDS[kind])


def as_kernel(matrix: Tensor) -> Kernel:
    return Kernel({"all": matrix[None]}, 3)


def exact_kernel(rows: Tensor, metric: Tensor) -> Tensor:
    wide = rows.flatten(0, 1)
    return wide @ torch.linalg.solve(metric, wide.T)


def near_kernel(rows: Tensor, metric: Tensor, columns: int = 60) -> Tensor:
    """Of random projections of the rows."""
    root = torch.linalg.cholesky(torch.linalg.inv(metric))
    wide = rows.flatten(0, 1) @ root @ normal(rows.shape[2], columns, seed=4) / columns**0.5
    return wide @ wide.T


def begin(problem: QuadraticProblem, kernel: Tensor, metric: Metric | None = None) -> CoefficientDescent:
    zeros = part(torch.zeros(COUNT, dtype=torch.float64))
    return CoefficientDescent(problem, zeros, DualPrecondition(problem, as_kernel(kernel)), metric=metric)


def pull(descent: ConjugateGradient, rows: Tensor) -> None:
    descent.receive_sides(*(part(torch.einsum("icp,ic->p", rows, side)) for side in descent.sides))


def steps(descent: ConjugateGradient, rows: Tensor, count: int) -> Iterator[int]:
    """Yields with a fresh gradient: at the start, and after every step."""
    pull(descent, rows)
    yield 0
    for step in range(count):
        descent.receive_image(rows @ flat(descent.direction))
        pull(descent, rows)
        yield step + 1


def run(descent: Any, rows: Tensor, count: int) -> Any:
    for _ in steps(descent, rows, count):
        pass
    return descent


@pytest.mark.parametrize("metric", [Metric(), METRIC])
@pytest.mark.parametrize("kind", list(KINDS))
def test_every_step_tells_the_truth_and_nears_the_optimum(kind: str, metric: Metric) -> None:
    problem, rows = build(kind), jacobian()
    dense = DenseRidge(problem, rows, metric_matrix(metric, SHAPES))
    best, root = dense.optimum(), problem.root_weight
    error_of = lambda gamma: root * (dense.outputs(best) - problem.target) + problem.ridge * gamma  # noqa: E731
    dual = -root * (dense.outputs(best) - problem.target) / problem.ridge
    assert error_of(dual).norm() < EXACT
    descent, before = begin(problem, near_kernel(rows, dense.metric), metric), math.inf
    start = dense.gradient_length(torch.zeros(COUNT, dtype=torch.float64))
    for step in steps(descent, rows, 8):
        moved, certificate = flat(descent.movement), descent.certificate
        assert descent.steps == step
        for tensors, gamma in ((descent.movement, descent.coefficients), (descent.direction, descent.change)):
            pulled = torch.einsum("icp,ic->p", rows, root * gamma)
            want = torch.linalg.solve(dense.metric, pulled)
            assert (flat(tensors) - want).norm() <= EXACT * (want.norm() + best.norm())
        assert near(descent.outputs, dense.outputs(dense.with_intercept(moved)), EXACT)
        assert (flat(descent.gradient) - dense.gradient(moved)).norm() <= EXACT * start
        pulled = torch.einsum("icp,ic->p", rows, root * descent.misfit)
        assert (flat(descent.gradient) - pulled).norm() <= EXACT * start
        assert certificate.relative_gradient == pytest.approx(dense.gradient_length(moved) / start, rel=1e-6, abs=EXACT)
        assert certificate.objective == pytest.approx(dense.objective(moved), rel=EXACT)
        distance = dense.length(moved - best[:COUNT])
        assert distance <= certificate.distance_bound + EXACT * dense.length(best[:COUNT])
        error = distance**2 + problem.ridge * float((descent.coefficients - dual).square().sum())
        assert error <= before * (1 + EXACT) + 1e-20
        before = error
    run(descent, rows, 30)
    assert near(flat(descent.movement), best[:COUNT], 1e-8)
    assert near(descent.coefficients, dual, 1e-8)
    if problem.intercept:
        assert near(descent.intercept, best[COUNT:], 1e-8)
    if problem.weight is not None:
        assert not descent.coefficients[WEIGHTS == 0].any()


@pytest.mark.parametrize("metric", [Metric(), METRIC])
@pytest.mark.parametrize("kind", list(KINDS))
def test_the_exact_kernel_takes_one_step(kind: str, metric: Metric) -> None:
    problem, rows = build(kind), jacobian()
    dense = DenseRidge(problem, rows, metric_matrix(metric, SHAPES))
    descent = run(begin(problem, exact_kernel(rows, dense.metric), metric), rows, 1)
    assert descent.length == pytest.approx(1.0, rel=EXACT)
    assert near(flat(descent.movement), dense.optimum()[:COUNT], EXACT)
    assert descent.certificate.relative_gradient < EXACT


@pytest.mark.parametrize("kind", list(KINDS))
def test_these_are_textbook_conjugate_gradients_on_the_dual(kind: str) -> None:
    problem, rows = build(kind), jacobian()
    identity = torch.eye(COUNT, dtype=torch.float64)
    root = problem.root_weight.repeat_interleave(3, 0)
    system = root * exact_kernel(rows, identity) * root.T + problem.ridge * torch.eye(24, dtype=torch.float64)
    descent = begin(problem, near_kernel(rows, identity))
    # What the intercept takes is projected out of residuals; steps have no part in it.
    border = root * torch.eye(3, dtype=torch.float64).repeat(8, 1)
    out = torch.eye(24, dtype=torch.float64)
    if problem.intercept:
        out = out - border @ torch.linalg.solve(border.T @ border, border.T)

    def invert(side: Tensor) -> Tensor:
        return descent.approximate_inverse(side.view(8, 3)).flatten()

    gamma = torch.zeros(24, dtype=torch.float64)
    residual = out @ (root[:, 0] * problem.residual.flatten())
    direction = solved = invert(residual)
    for _ in steps(descent, rows, 8):
        assert (descent.coefficients.flatten() - gamma).norm() <= 1e-8 * (gamma.norm() + 1e-12)
        assert (descent.misfit.flatten() + residual).norm() <= 1e-8 * problem.residual.norm()
        length = residual @ solved / (direction @ system @ direction)
        gamma, left = gamma + length * direction, residual - length * out @ system @ direction
        again = invert(left)
        direction = again + (left @ again) / (residual @ solved) * direction
        residual, solved = left, again


@pytest.mark.parametrize("intercept", [False, True])
def test_an_ill_conditioned_kernel_takes_as_few_steps_as_its_sketch_is_good(intercept: bool) -> None:
    # Eigenvalues from 1 to 1e-6 and a ridge of 1e-6: directions made conjugate in the weights end at a gradient
    # larger than that of the start.
    samples, count = 60, 600
    left, right = torch.linalg.qr(normal(samples, samples))[0], torch.linalg.qr(normal(count, samples))[0]
    spectrum = torch.logspace(0, -6, samples, dtype=torch.float64)
    rows = (left * spectrum.sqrt()) @ right.T
    problem = QuadraticProblem(torch.zeros(samples, 1), normal(samples, 1, seed=1), 1e-6, intercept=intercept)
    sketched = rows @ normal(count, 4 * samples, seed=2) / (4 * samples) ** 0.5
    inverse = DualPrecondition.of_rows(problem, sketched[:, None])
    descent = CoefficientDescent(problem, {"w": torch.zeros(count, dtype=torch.float64)}, inverse)
    # Gaussian sketches of ratio 4 have a condition of about 9, for which the error is halved in every step: by 1e12 in
    # 40, of which the norm that falls takes at most 1e3, the root of the system's condition.
    for _ in range(40):
        descent.receive_sides(*({"w": rows.T @ side[:, 0]} for side in descent.sides))
        descent.receive_image((rows @ descent.direction["w"])[:, None])
    descent.receive_sides(*({"w": rows.T @ side[:, 0]} for side in descent.sides))
    assert descent.certificate.relative_gradient < 1e-6
    dense = DenseRidge(problem, rows[:, None])
    assert near(descent.movement["w"], dense.optimum()[:count], 1e-5)


def sketched(net: Any, x: Tensor, metric: Metric, reducer: Any = None, index: Tensor | None = None) -> Tensor:
    """Rows of all parameters but the intercept, in groups by weight of the metric."""
    groups: dict[str, list[str]] = {}
    for name, _ in net.named_parameters():
        if name != "6.bias":
            groups.setdefault(str(metric.weights.get(name, 1.0)), []).append(name)
    scales = {group: 1 / float(group) for group in groups}
    model, batches = LinearizedModel(net, example=build_x()), list(x.split(2)) if len(x) else []
    return sketch_rows(model, groups, batches, 60, scales=scales, reducer=reducer, index=index)


def build_x() -> Tensor:
    return torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def problems(initial: Tensor) -> list[QuadraticProblem]:
    draws = [5 * normal(*initial.shape, seed=seed) for seed in range(2)]
    weight = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64)
    return [
        QuadraticProblem(initial, draws[0], 3.0),
        QuadraticProblem(initial, draws[1], 20.0, intercept=True),
        QuadraticProblem(initial, draws[1], 0.5, weight=weight, intercept=True),
    ]


@pytest.mark.parametrize("weights", [{}, {"3.conv1.weight": 4.0, "3.conv2.bias": 4.0, "6.weight": 0.5}])
def test_sketches_of_a_network_lead_to_the_optimum(weights: dict[str, float], x: Tensor) -> None:
    net, metric = build_net("residual"), Metric(weights)
    names = [name for name, _ in net.named_parameters() if name != "6.bias"]
    found, rows = problems(net(x).detach()), sketched(net, x, metric)
    solutions = solve_cg(
        found, StreamedJacobian(LinearizedModel(net, example=x), x.split(2)), exclude=["6.bias"], metric=metric,
        tolerance=1e-11, approximate_inverse=lambda problem: DualPrecondition.of_rows(problem, rows), max_steps=40,
    )  # fmt: skip
    matrix = metric_matrix(metric, {name: net.get_parameter(name).shape for name in names})
    for problem, solution in zip(found, solutions, strict=True):
        dense = DenseRidge(problem, network_jacobian(net, x, names), matrix)
        assert solution.certificate.relative_gradient <= 1e-11
        assert solution.direction is not None
        best = dense.optimum()
        assert near(flat(solution.direction, names), best[: dense.size], 1e-8)
        assert near(solution.outputs, dense.outputs(best), 1e-8)
        distance = dense.length(flat(solution.direction, names) - best[: dense.size])
        assert distance <= solution.certificate.distance_bound + 1e-12 * dense.length(best[: dense.size])


def test_curvature_as_the_metric_with_any_kernel(x: Tensor) -> None:
    net = build_net("residual")
    names = [name for name, _ in net.named_parameters() if name != "6.bias"]
    kfac = fit_kfac(net, None, [x], damping=0.5, intercept="6.bias")
    metric, problem = KroneckerMetric(kfac, 0.5), problems(net(x).detach())[2]
    matrix = metric_matrix(metric, {name: net.get_parameter(name).shape for name in names})
    rows = network_jacobian(net, x, names)
    root = normal(15, 15, seed=7)
    for kernel, most in ((exact_kernel(rows, matrix), 1), (root @ root.T + torch.eye(15, dtype=torch.float64), 60)):
        (solution,) = solve_cg(
            [problem], StreamedJacobian(LinearizedModel(net, example=x), x.split(2)), exclude=["6.bias"],
            metric=metric, tolerance=1e-9, max_steps=most,
            approximate_inverse=lambda problem, kernel=kernel: DualPrecondition(problem, as_kernel(kernel)),
        )  # fmt: skip
        dense = DenseRidge(problem, rows, matrix)
        assert solution.direction is not None
        assert near(flat(solution.direction, names), dense.optimum()[: dense.size], 1e-8)


@pytest.mark.parametrize("shards", [[[3, 0, 4, 2, 1]], [[0, 3, 1, 4], [4, 2]], [[4, 2], [0, 1, 3], []]])
def test_ranks_agree_with_a_single_process(shards: list[list[int]], x: Tensor) -> None:
    def solve(shards: list[list[int]]) -> list[tuple[Tensor, Tensor]]:
        reducer, net = current_reducer(), build_net("residual")
        own = torch.tensor(shards[reducer.rank], dtype=torch.int64)
        rows = sketched(net, x[own], Metric(), reducer, own)
        batches = list(x[own].split(2)) if len(own) else []
        found = problems(net(x).detach())
        solutions = solve_cg(
            found, StreamedJacobian(LinearizedModel(net, example=x), batches), exclude=["6.bias"], max_steps=4,
            tolerance=1e-9, positions=own, reducer=reducer,
            approximate_inverse=lambda problem: DualPrecondition.of_rows(problem, rows),
        )  # fmt: skip
        return [(flat(solution.direction or {}), solution.outputs) for solution in solutions]

    expected = solve([[0, 1, 2, 3, 4]])
    results = run_on_ranks(len(shards), solve, shards)
    for solutions in results:
        for got, want, first in zip(solutions, expected, results[0], strict=True):
            for mine, right, same in zip(got, want, first, strict=True):
                assert near(mine, right, 1e-10)
                assert torch.equal(mine, same)


@pytest.mark.parametrize("halfway", [False, True])
def test_an_interrupted_descent_goes_on_bit_by_bit(halfway: bool) -> None:
    problem, rows = build("both"), jacobian()
    kernel = near_kernel(rows, metric_matrix(METRIC, SHAPES), 30)
    descent = run(begin(problem, kernel, METRIC), rows, 3)
    if halfway:
        descent.receive_image(rows @ flat(descent.direction))
    state, buffer = descent.state(), io.BytesIO()
    frozen = copy.deepcopy(state)
    torch.save(state, buffer)
    buffer.seek(0)
    other = begin(problem, kernel, METRIC)
    other.restore(torch.load(buffer, weights_only=True), descent.image)
    assert other.steps == descent.steps
    if not halfway:
        assert other.certificate == descent.certificate
        for each in (descent, other):
            each.receive_image(rows @ flat(each.direction))
    for _ in zip(steps(descent, rows, 3), steps(other, rows, 3), strict=True):
        assert torch.equal(flat(other.movement), flat(descent.movement))
        assert torch.equal(flat(other.direction), flat(descent.direction))
        assert torch.equal(other.coefficients, descent.coefficients)
        assert torch.equal(other.change, descent.change)
        assert other.certificate == descent.certificate
    for name, kept in frozen.items():
        same: Any = state[name]
        assert torch.equal(flat(same), flat(kept)) if isinstance(kept, dict) else same == kept


def test_the_state_of_another_descent_is_refused() -> None:
    problem, rows = build(), jacobian()
    plain = run(ConjugateGradient(problem, part(torch.zeros(COUNT, dtype=torch.float64))), rows, 2)
    descent = begin(problem, exact_kernel(rows, torch.eye(COUNT, dtype=torch.float64)))
    with pytest.raises(ValueError, match="no coefficients"):
        descent.restore(plain.state(), plain.image)
    assert descent.steps == 0


def test_linear_terms_are_refused() -> None:
    problem = build().with_(linear=normal(8, 3))
    with pytest.raises(ValueError, match="linear terms"):
        begin(problem, torch.eye(24, dtype=torch.float64))


def test_nothing_to_explain_means_no_step() -> None:
    problem, rows = build().with_(target=build().initial), jacobian()
    descent = run(begin(problem, torch.eye(24, dtype=torch.float64)), rows, 2)
    assert not flat(descent.movement).any()
    assert descent.certificate.relative_gradient == 0.0


def test_what_is_not_finite_is_an_error() -> None:
    rows = jacobian()
    descent = begin(build(), torch.eye(24, dtype=torch.float64))
    residual, step = (part(torch.einsum("icp,ic->p", rows, side)) for side in descent.sides)
    with pytest.raises(FloatingPointError, match="check the images"):
        descent.receive_sides({**residual, "bias": residual["bias"] * math.nan}, step)
    zeros = part(torch.zeros(COUNT, dtype=torch.float64))
    broken = CoefficientDescent(build(), zeros, lambda side: side * math.nan)
    with pytest.raises(FloatingPointError, match="check the preconditioner"):
        pull(broken, rows)
