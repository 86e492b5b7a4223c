from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear.dense_ridge import DenseRidge, flat, metric_matrix, near, network_jacobian, normal
from linear.nets import build_net
from lqf_lightning.linear import LinearizedModel, fit_kfac
from lqf_lightning.linear.conjugate_gradient import ConjugateGradient
from lqf_lightning.linear.jacobian import StreamedJacobian
from lqf_lightning.linear.metric import KroneckerMetric, Metric
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.solution import Solution
from lqf_lightning.linear.solve_cg import solve_cg

TIGHT = 1e-11  # relative gradient to which is solved
CLOSE = 1e-8  # relative: the gradient's tolerance times the condition of a few hundred
WEIGHTS = torch.tensor([1.0, 0.0, 2.0, 0.5, 3.0], dtype=torch.float64)
HEAD = {"residual": "6.bias", "depthwise": "7.bias", "transformer": "head.bias"}


class Counted(StreamedJacobian):
    """Notes the number of directions and right-hand sides of every pass."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.pushed: list[int] = []
        self.pulled: list[int] = []

    def push(self, *directions: Any) -> list[Tensor]:
        self.pushed.append(len(directions))
        return super().push(*directions)

    def pull(self, *rows: Tensor) -> list[dict[str, Tensor]]:
        self.pulled.append(len(rows))
        return super().pull(*rows)


def streamed(net: nn.Module, x: Tensor, names: Sequence[str] | None = None) -> Counted:
    return Counted(LinearizedModel(net, names, example=x), x.split(2))


def problems(initial: Tensor) -> list[QuadraticProblem]:
    """Everything that may differ between problems on the same Jacobian."""
    draw = [5 * normal(*initial.shape, seed=seed) for seed in range(3)]
    return [
        QuadraticProblem(initial, draw[0], 3.0),
        QuadraticProblem(initial, draw[1], 20.0, intercept=True),
        QuadraticProblem(initial, draw[0], 5.0, weight=WEIGHTS),
        QuadraticProblem(initial, draw[1], 5.0, weight=WEIGHTS, linear=draw[2], intercept=True),
    ]


def check(solution: Solution, dense: DenseRidge, names: list[str]) -> None:
    optimum, problem, direction = dense.optimum(), dense.problem, solution.direction
    assert direction is not None
    assert solution.coefficients is not None
    assert set(direction) == set(names)
    moved = flat(direction, names)
    assert near(moved, optimum[: dense.size], CLOSE)
    assert near(solution.outputs, dense.outputs(optimum), CLOSE)
    pulled = torch.einsum("icp,ic->p", dense.rows[:, :, : dense.size], solution.coefficients)
    assert near(torch.linalg.solve(dense.metric, pulled), moved, CLOSE)
    assert dense.length(moved - optimum[: dense.size]) <= solution.certificate.distance_bound + 1e-12 * dense.length(
        moved
    )
    assert solution.certificate.objective == pytest.approx(dense.objective(optimum[: dense.size]), rel=1e-10)
    if problem.intercept:
        assert near(solution.intercept, optimum[dense.size :], CLOSE)
        assert solution.coefficients.sum(0).abs().max() < 1e-10 * solution.coefficients.norm()
    else:
        assert torch.equal(solution.intercept, torch.zeros(problem.outputs, dtype=torch.float64))
    if problem.weight is not None:
        silent = -dense.linear[WEIGHTS == 0] / problem.ridge
        assert torch.equal(solution.coefficients[WEIGHTS == 0], silent)


@pytest.mark.parametrize(("kind", "outputs"), [("residual", 1), ("residual", 3), ("depthwise", 3), ("transformer", 3)])
def test_several_problems_at_once_reach_their_optima(kind: str, outputs: int, x: Tensor) -> None:
    net, head = build_net(kind), HEAD[kind]
    if outputs == 1:
        net[-1] = nn.Linear(4, 1).double()
    names = [name for name, _ in net.named_parameters() if name != head]
    initial, rows = net(x).detach(), network_jacobian(net, x, names)
    jacobian = streamed(net, x)
    found = problems(initial)
    for problem, solution in zip(
        found, solve_cg(found, jacobian, exclude=[head], tolerance=TIGHT, max_steps=300), strict=True
    ):
        assert solution.certificate.relative_gradient <= TIGHT
        check(solution, DenseRidge(problem, rows), names)
    assert not any(delta.any() for delta in jacobian.model.deltas.values())


def test_without_an_intercept_every_parameter_may_move(x: Tensor) -> None:
    net = build_net("residual")
    names = [name for name, _ in net.named_parameters()]
    problem = problems(net(x).detach())[2]
    dense = DenseRidge(problem, network_jacobian(net, x, names))
    (solution,) = solve_cg([problem], streamed(net, x), tolerance=TIGHT, max_steps=300)
    check(solution, dense, names)


def test_parameters_that_are_not_linearized_stay(x: Tensor) -> None:
    net, names = build_net("residual"), ["6.weight", "3.bn2.weight"]
    problem = problems(net(x).detach())[0]
    dense = DenseRidge(problem, network_jacobian(net, x, names))
    (solution,) = solve_cg([problem], streamed(net, x, names), tolerance=TIGHT)
    check(solution, dense, names)


def test_group_weights_are_the_metric(x: Tensor) -> None:
    net = build_net("residual")
    names = [name for name, _ in net.named_parameters() if name != "6.bias"]
    metric = Metric({name: 4.0 for name in names if name.startswith("3.")})
    matrix = metric_matrix(metric, {name: net.get_parameter(name).shape for name in names})
    rows, found = network_jacobian(net, x, names), problems(net(x).detach())
    solutions = solve_cg(found, streamed(net, x), exclude=["6.bias"], tolerance=TIGHT, max_steps=300, metric=metric)
    for problem, solution in zip(found, solutions, strict=True):
        check(solution, DenseRidge(problem, rows, matrix), names)


@pytest.mark.parametrize("preconditioned", [False, True])
def test_the_curvature_may_be_the_metric(preconditioned: bool, x: Tensor) -> None:
    net = build_net("residual")
    names = [name for name, _ in net.named_parameters() if name != "6.bias"]
    kfac = fit_kfac(net, None, [x], damping=1.0, intercept="6.bias")
    metric = KroneckerMetric(kfac, 0.1)
    matrix = metric_matrix(metric, {name: net.get_parameter(name).shape for name in names})
    rows, found = network_jacobian(net, x, names), problems(net(x).detach())
    solutions = solve_cg(
        found, streamed(net, x), exclude=["6.bias"], tolerance=TIGHT, max_steps=300, metric=metric,
        precondition=(lambda ridge: metric.curvature_solver(kfac, len(x), ridge)) if preconditioned else None,
    )  # fmt: skip
    for problem, solution in zip(found, solutions, strict=True):
        check(solution, DenseRidge(problem, rows, matrix), names)


def test_kronecker_factors_for_a_preconditioner_change_the_way_not_the_optimum(x: Tensor) -> None:
    net = build_net("residual")
    names = [name for name, _ in net.named_parameters() if name != "6.bias"]
    rows, found = network_jacobian(net, x, names), problems(net(x).detach())
    kfac = fit_kfac(net, None, [x], damping=1.0, intercept="6.bias")
    ridges: list[float] = []

    def precondition(ridge: float) -> Any:
        ridges.append(ridge)
        return Metric().curvature_solver(kfac, len(x), ridge)

    solutions = solve_cg(
        found, streamed(net, x), exclude=["6.bias"], tolerance=TIGHT, max_steps=300, precondition=precondition
    )
    assert ridges == [problem.ridge for problem in found]
    for problem, solution in zip(found, solutions, strict=True):
        check(solution, DenseRidge(problem, rows), names)


@pytest.mark.parametrize("intercept", [True, False])
@pytest.mark.parametrize("weights", [{}, {"weight": 3.0}])
def test_one_dense_layer_with_its_curvature_takes_one_step(intercept: bool, weights: dict[str, float]) -> None:
    net, x = nn.Linear(5, 3, bias=intercept).double(), normal(9, 5) + 2.0
    problem = QuadraticProblem(net(x).detach(), 5 * normal(9, 3, seed=1), 0.3, intercept=intercept)
    kfac = fit_kfac(net, None, x.split(4), damping=1.0, intercept="bias" if intercept else None)
    metric, jacobian = Metric(weights), streamed(net, x)
    (solution,) = solve_cg(
        [problem], jacobian, exclude=["bias"] if intercept else [], tolerance=1e-10, metric=metric,
        precondition=lambda ridge: metric.curvature_solver(kfac, len(x), ridge),
    )  # fmt: skip
    assert jacobian.pushed == [1]
    matrix = weights.get("weight", 1.0) * torch.eye(15, dtype=torch.float64)
    check(solution, DenseRidge(problem, network_jacobian(net, x, ["weight"]), matrix), ["weight"])


def test_problems_share_their_passes_and_drop_out_when_they_have_converged(x: Tensor) -> None:
    net = build_net("residual")
    hard, easy = [p.with_(ridge=ridge) for p, ridge in zip(problems(net(x).detach()), (1.0, 1e4), strict=False)]
    solved = hard.with_(target=hard.initial)
    jacobian = streamed(net, x)
    steps: list[list[int]] = []
    solutions = solve_cg(
        [hard, solved, easy], jacobian, exclude=["6.bias"], tolerance=1e-6,
        note=lambda descents: steps.append([descent.steps for descent in descents]),
    )  # fmt: skip
    total = steps[-1]
    assert total[1] == 0 < total[2] < total[0]
    assert steps == [[min(k + 1, limit) for limit in total] for k in range(total[0])]
    assert jacobian.pushed == [sum(k < limit for limit in total) for k in range(total[0])]
    assert jacobian.pulled == [3, *jacobian.pushed]
    assert all(solution.certificate.relative_gradient <= 1e-6 for solution in solutions)
    for problem, solution in zip((hard, easy), solutions[::2], strict=True):
        (alone,) = solve_cg([problem], streamed(net, x), exclude=["6.bias"], tolerance=1e-6)
        assert near(solution.outputs, alone.outputs, 1e-12)


def test_nothing_to_explain_means_no_step(x: Tensor) -> None:
    net = build_net("residual")
    initial, jacobian = net(x).detach(), streamed(net, x)
    (solution,) = solve_cg([QuadraticProblem(initial, initial, 1.0)], jacobian)
    assert jacobian.pushed == []
    assert solution.direction is not None
    assert not flat(solution.direction).any()
    assert solution.certificate.distance_bound == 0.0
    assert torch.equal(solution.outputs, initial)


def test_no_more_steps_than_allowed_and_the_certificate_says_how_far_that_got(x: Tensor) -> None:
    net = build_net("residual")
    names = [name for name, _ in net.named_parameters()]
    problem = problems(net(x).detach())[0]
    dense, jacobian, seen = DenseRidge(problem, network_jacobian(net, x, names)), streamed(net, x), []

    def watch(steps: Iterable[int]) -> Iterator[int]:
        for step in steps:
            seen.append(step)
            yield step

    (solution,) = solve_cg([problem], jacobian, tolerance=1e-9, max_steps=3, watch=watch)
    assert jacobian.pushed == [1, 1, 1]
    assert seen == [0, 1, 2]
    assert solution.direction is not None
    moved = flat(solution.direction, names)
    start = dense.gradient_length(torch.zeros(dense.size, dtype=torch.float64))
    assert solution.certificate.relative_gradient == pytest.approx(dense.gradient_length(moved) / start, rel=1e-9)
    assert solution.certificate.distance_bound >= dense.length(moved - dense.optimum()) > 0
    (untouched,) = solve_cg([problem], streamed(net, x), max_steps=0)
    assert untouched.certificate.relative_gradient == 1.0


def test_the_order_of_samples_does_not_matter(x: Tensor) -> None:
    net, order = build_net("residual"), torch.tensor([3, 0, 4, 1, 2])
    found = problems(net(x).detach())
    moved = [
        p.with_(
            initial=p.initial[order],
            target=p.target[order],
            weight=None if p.weight is None else p.weight[order],
            linear=None if p.linear is None else p.linear[order],
        )
        for p in found
    ]
    options: Any = {"exclude": ["6.bias"], "tolerance": TIGHT, "max_steps": 300}
    expected = solve_cg(found, streamed(net, x), **options)
    shuffled = solve_cg(moved, streamed(net, x[order]), **options)
    placed = solve_cg(found, streamed(net, x[order]), positions=order, **options)
    for want, got, same in zip(expected, shuffled, placed, strict=True):
        assert want.direction
        assert got.direction
        assert same.direction
        assert near(flat(got.direction, list(want.direction)), flat(want.direction), CLOSE)
        assert near(flat(same.direction, list(want.direction)), flat(want.direction), CLOSE)
        assert near(got.outputs, want.outputs[order], CLOSE)
        assert near(same.outputs, want.outputs, CLOSE)


@pytest.mark.parametrize("kind", ["residual", "depthwise"])
def test_single_precision_is_enough_for_usual_certificates(kind: str, x: Tensor) -> None:
    net, wide = build_net(kind, torch.float32), build_net(kind)
    names = [name for name, _ in net.named_parameters() if name != HEAD[kind]]
    found = [p.with_(initial=p.initial.float(), target=p.target.float()) for p in problems(net(x.float()).detach())]
    solutions = solve_cg(found, streamed(net, x.float()), exclude=[HEAD[kind]], tolerance=1e-4, max_steps=100)
    for problem, solution in zip(found, solutions, strict=True):
        dense = DenseRidge(problem, network_jacobian(wide, x, names))
        start = dense.gradient_length(torch.zeros(dense.size, dtype=torch.float64))
        assert solution.direction is not None
        assert solution.certificate.relative_gradient <= 1e-4
        assert dense.gradient_length(flat(solution.direction, names)) <= 1.1e-4 * start
        assert all(entry.dtype == torch.float32 for entry in solution.direction.values())


def test_if_nothing_may_move_the_intercept_is_fitted_alone(x: Tensor) -> None:
    net = build_net("residual")
    problem, jacobian = problems(net(x).detach())[3], streamed(net, x, ["6.bias"])
    (solution,) = solve_cg([problem], jacobian, exclude=["6.bias"])
    assert jacobian.pushed == []
    assert problem.linear is not None
    expected = (WEIGHTS[:, None] * problem.residual - problem.linear).sum(0) / WEIGHTS.sum()
    assert near(solution.intercept, expected, 1e-12)


def test_nothing_depends_on_surrounding_gradient_modes(x: Tensor) -> None:
    net = build_net("residual")
    found = problems(net(x).detach())[:1]
    (expected,) = solve_cg(found, streamed(net, x), max_steps=4)
    with torch.inference_mode():
        (got,) = solve_cg(found, streamed(net, x), max_steps=4)
    assert torch.equal(got.outputs, expected.outputs)
    assert expected.direction is not None
    assert not any(entry.requires_grad for entry in expected.direction.values())


def test_bad_arguments_are_explained(x: Tensor) -> None:
    net = build_net("residual")
    first = problems(net(x).detach())[0]
    short = QuadraticProblem(first.initial[:4], first.target[:4], 1.0)
    with pytest.raises(ValueError, match=r"got numbers of samples \[\]"):
        solve_cg([], streamed(net, x))
    with pytest.raises(ValueError, match=r"got numbers of samples \[4, 5\]"):
        solve_cg([first, short], streamed(net, x))
    with pytest.raises(ValueError, match=r"cannot exclude '6\.bios'"):
        solve_cg([first], streamed(net, x), exclude=["6.weight", "6.bios"])
    with pytest.raises(ValueError, match="right-hand sides have 4 rows, fewer"):
        solve_cg([short], streamed(net, x))
    with pytest.raises(ValueError, match="held by no rank"):
        solve_cg([first], streamed(net, x[:4]), positions=torch.arange(4))


def test_images_that_are_not_finite_are_noticed(x: Tensor) -> None:
    net = build_net("residual")
    found = problems(net(x).detach())[:1]
    broken = x.clone()
    broken[3, 0, 0, 0] = torch.nan
    jacobian = Counted(LinearizedModel(net, example=x), broken.split(2))
    with pytest.raises(FloatingPointError, match="check the images"):
        solve_cg(found, jacobian)


def test_the_state_of_a_run_can_be_taken_up_again_by_hand(x: Tensor) -> None:
    net = build_net("residual")
    problem, jacobian = problems(net(x).detach())[0], streamed(net, x)
    kept: list[Any] = []
    (expected,) = solve_cg([problem], jacobian, max_steps=6, tolerance=0, note=lambda d: kept.append(d[0].state()))
    descent = ConjugateGradient(problem, kept[0]["movement"], image=torch.zeros_like(problem.initial))
    descent.restore(kept[2], jacobian.push(kept[2]["movement"])[0])
    for _ in range(3):
        descent.receive_image(jacobian.push(descent.direction)[0])
        descent.receive_gradient(jacobian.pull(descent.residual)[0])
    assert near(descent.outputs, expected.outputs, 1e-10)
    assert descent.steps == 6
