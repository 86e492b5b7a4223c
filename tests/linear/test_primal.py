from typing import Any

import pytest
import torch
from torch import Tensor

from linear.nets import build_net, dense_jacobian
from lqf_lightning.linear import DistributedReducer, Reducer
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.features import Features, first_copies
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.primal import PrimalFactor, leave_one_out_primal
from lqf_lightning.linear.problem import QuadraticProblem
from ranks import run_on_ranks

EXACT = 1e-9  # relative, float64: condition numbers up to 1e5 and a few hundred operations

# samples, outputs, features, shared by the outputs
SHAPES = {"wide": (6, 3, 40, False), "tall": (12, 3, 8, False), "probe": (12, 3, 5, True), "one": (7, 1, 20, False)}


def make(shape: str, intercept: bool, weights: bool, ridge: float = 0.3) -> tuple[QuadraticProblem, Tensor, Tensor]:
    samples, outputs, width, shared = SHAPES[shape]
    generator = torch.Generator().manual_seed(5)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    weight = torch.rand(samples, generator=generator, dtype=torch.float64) * 3 if weights else None
    linear = 0.4 * draw(samples, outputs) if weights else None
    if weight is not None and linear is not None:
        weight[2] = 0.0
        linear[2] = 0.0
    rows, other = (draw(count, 1 if shared else outputs, width) for count in (samples, 4))
    initial, target = draw(samples, outputs), draw(samples, outputs)
    return QuadraticProblem(initial, target, ridge, weight, linear, intercept), rows, other


def kernel(left: Tensor, right: Tensor, outputs: int) -> Kernel:
    matrix = torch.einsum("iad,jbd->iajb", left, right).flatten(2, 3).flatten(0, 1)
    form: Any = "full" if left.shape[1] == outputs else "last_layer"
    return Kernel({"all": matrix[None]}, outputs, form)


def brute(problem: QuadraticProblem, rows: Tensor, keep: Tensor) -> tuple[Tensor, Tensor]:
    """Minimize over the stacked weights of all outputs by a least-squares solver; dw (D * columns,) and b (C,)."""
    outputs = problem.outputs
    wide = rows if rows.shape[1] == outputs else torch.einsum("od,cp->ocdp", rows[:, 0], torch.eye(outputs).double())
    design = wide.reshape(len(rows), outputs, -1)
    width = design.shape[2]
    eye = torch.eye(outputs).double() * problem.intercept
    design = torch.cat([design, eye.expand(len(rows), -1, -1)], 2)
    weight = problem.root_weight.square() * keep[:, None]
    curvature = torch.einsum("ica,ic,icb->ab", design, weight.expand(-1, outputs), design)
    penalty = torch.full((design.shape[2],), problem.ridge, dtype=torch.float64)
    penalty[width:] = 0 if problem.intercept else 1
    force = weight * problem.residual - problem.linear_terms * keep[:, None]
    u = torch.linalg.solve(curvature + penalty.diag(), torch.einsum("ica,ic->a", design, force))
    return u[:width], u[width:] * problem.intercept


def evaluate(problem: QuadraticProblem, rows: Tensor, u: tuple[Tensor, Tensor]) -> Tensor:
    if rows.shape[1] == problem.outputs:
        return rows @ u[0] + u[1]
    return rows[:, 0] @ u[0].view(rows.shape[2], -1) + u[1]


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * max(float(want.norm()), 1e-6))


@pytest.fixture(params=list(SHAPES))
def shape(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[False, True], ids=["through zero", "intercept"])
def intercept(request: pytest.FixtureRequest) -> Any:
    return request.param


@pytest.fixture(params=[False, True], ids=["plain", "weighted"])
def weights(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_optimum_is_that_of_a_brute_force_solve(shape: str, intercept: bool, weights: bool) -> None:
    problem, rows, other = make(shape, intercept, weights)
    factor = PrimalFactor(problem, Features(rows))
    solution = factor.solution()
    u = brute(problem, rows, torch.ones(len(rows)).double())
    assert solution.direction is not None
    assert close(solution.direction["features"].flatten(), u[0])
    assert close(solution.intercept, u[1])
    assert close(solution.outputs, problem.initial + evaluate(problem, rows, u))
    assert close(factor.predict(other, torch.ones(4, problem.outputs)), 1 + evaluate(problem, other, u))
    assert solution.coefficients is not None
    pulled = torch.einsum("iqd,iqs->ds", rows, solution.coefficients.reshape(len(rows), rows.shape[1], -1))
    assert close(pulled.flatten(), u[0])


def test_leave_one_out_is_that_of_solving_without_each_sample(shape: str, intercept: bool, weights: bool) -> None:
    problem, rows, other = make(shape, intercept, weights)
    result = leave_one_out_primal(problem, Features(rows), Features(other))
    whole = brute(problem, rows, torch.ones(len(rows)).double())
    for i in range(len(rows)):
        keep = torch.ones(len(rows)).double()
        keep[i] = 0
        without = brute(problem, rows, keep)
        prediction = problem.initial[i] + evaluate(problem, rows[i : i + 1], without)[0]
        assert close(result.prediction[i], prediction)
        assert close(result.residual[i], problem.target[i] - prediction)
        assert close(result.weight_change[i], (whole[0] - without[0]).square().sum())
        assert close(result.intercept_change[i], whole[1] - without[1])
        moved = evaluate(problem, other, whole) - evaluate(problem, other, without)
        assert result.function_change is not None
        assert close(result.function_change[i], moved.square().sum() / 4)


def test_dual_form_gives_the_same_numbers(shape: str, intercept: bool, weights: bool) -> None:
    problem, rows, other = make(shape, intercept, weights, ridge=0.05)
    primal = PrimalFactor(problem, Features(rows))
    dual = DualFactor(problem, kernel(rows, rows, problem.outputs))
    ours, theirs = primal.solution(), dual.solution()
    assert close(ours.outputs, theirs.outputs)
    assert ours.coefficients is not None
    assert theirs.coefficients is not None
    assert close(ours.coefficients, theirs.coefficients)
    assert abs(ours.certificate.objective - theirs.certificate.objective) <= EXACT * abs(theirs.certificate.objective)
    assert abs(primal.degrees_of_freedom - dual.degrees_of_freedom) <= EXACT * dual.degrees_of_freedom
    left = leave_one_out(primal, Features(other))
    right = leave_one_out(dual, kernel(other, rows, problem.outputs))
    for name in ("residual", "prediction", "leverage", "weight_change", "intercept_change", "cook", "function_change"):
        assert close(getattr(left, name), getattr(right, name)), name


def test_certificate_bounds_the_distance_of_a_spoiled_optimum(shape: str, intercept: bool) -> None:
    problem, rows, _ = make(shape, intercept, True)
    factor = PrimalFactor(problem, Features(rows))
    assert factor.solution().certificate.relative_gradient <= 1e-12
    exact = factor.weights.clone()
    width = rows.shape[2]
    factor.weights[:width] += 1e-3 * torch.randn(exact[:width].shape, dtype=torch.float64)
    certificate = factor.solution().certificate
    distance = float((factor.weights - exact)[:width].norm())
    assert distance <= certificate.distance_bound <= 1e3 * distance
    factor.weights.zero_()
    if intercept:
        weight = problem.root_weight.square()
        free = (weight * problem.residual - problem.linear_terms).sum(0) / weight.sum()
        factor.weights[width:] = free.reshape(factor.weights[width:].shape)
    assert abs(factor.solution().certificate.relative_gradient - 1) <= EXACT


def test_certificate_is_tight_where_only_the_ridge_curves(intercept: bool) -> None:
    problem, rows, _ = make("wide", intercept, True)
    factor = PrimalFactor(problem, Features(rows))
    flat = torch.linalg.eigh(factor.equations.matrix[:40, :40])[1][:, 0]  # 18 rows leave a null space
    factor.weights[:40, 0] += 0.01 * flat
    assert abs(factor.solution().certificate.distance_bound / 0.01 - 1) <= EXACT


def test_jacobian_of_a_small_network_solves_its_linearization(x: Tensor) -> None:
    net = build_net("residual")
    jacobian = torch.cat([entry.flatten(2) for entry in dense_jacobian(net, x).values()], 2)
    problem = QuadraticProblem(net(x).detach(), torch.eye(3).double()[[0, 1, 2, 0, 1]], ridge=0.1)
    solution = PrimalFactor(problem, Features(jacobian)).solution()
    dual = torch.linalg.solve(
        jacobian.flatten(0, 1) @ jacobian.flatten(0, 1).T + 0.1 * torch.eye(15).double(), problem.residual.flatten()
    )
    assert solution.coefficients is not None
    assert close(solution.coefficients.flatten(), dual)


def test_features_shared_by_the_outputs_stay_small() -> None:
    problem, rows, _ = make("probe", True, False)
    assert PrimalFactor(problem, Features(rows)).lower.shape == (6, 6)


def test_single_precision_features_are_summed_in_double() -> None:
    problem, rows, _ = make("tall", True, True)
    single = rows.float()
    expected = PrimalFactor(problem, Features(single.double())).solution()
    assert torch.equal(PrimalFactor(problem, Features(single)).solution().outputs, expected.outputs)


def test_blocks_of_samples_add_up(monkeypatch: pytest.MonkeyPatch, shape: str) -> None:
    problem, rows, other = make(shape, True, True)
    expected = leave_one_out_primal(problem, Features(rows), Features(other))
    monkeypatch.setattr("lqf_lightning.linear.normal_equations._CHUNK", 2 * rows[0].numel())
    result = leave_one_out_primal(problem, Features(rows), Features(other))
    assert close(result.residual, expected.residual)
    assert result.function_change is not None
    assert expected.function_change is not None
    assert close(result.function_change, expected.function_change)


def test_ranks_with_uneven_shards_and_repeated_samples_agree_with_one_process(shape: str) -> None:
    problem, rows, other = make(shape, True, True)
    cross = Features(other, torch.arange(4))
    expected = leave_one_out_primal(problem, Features(rows), cross)
    value = PrimalFactor(problem, Features(rows)).solution()
    count = len(rows)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(1))

    def work(world: int) -> Any:
        reducer = DistributedReducer()
        cuts = [0, 1, 4, count] if world == 3 else [0, 3, count]
        own = order[cuts[reducer.rank] : cuts[reducer.rank + 1]]
        own = torch.cat([own, order[:1], own[-1:]])  # padded, across ranks and within
        watched = torch.tensor([0, 3]) if reducer.rank == 0 else torch.tensor([1, 2, 0])
        assert problem.weight is not None
        assert problem.linear is not None
        parts = {name: getattr(problem, name)[own] for name in ("initial", "target", "weight", "linear")}
        local = QuadraticProblem(ridge=problem.ridge, intercept=True, **parts)
        spread = Features(rows[own], own), Features(other[watched], watched)
        result = leave_one_out_primal(local, *spread, reducer)
        solution = PrimalFactor(local, spread[0], reducer).solution()
        names = ("residual", "prediction", "weight_change", "cook", "function_change", "leverage")
        return [getattr(result, name) for name in names], solution.outputs, solution.certificate.objective

    names = ("residual", "prediction", "weight_change", "cook", "function_change", "leverage")
    for world in (2, 3):
        results = run_on_ranks(world, work, world)
        for entries, outputs, objective in results:
            assert close(outputs, value.outputs, 1e-10)
            assert abs(objective - value.certificate.objective) <= 1e-10 * abs(objective)
            for name, entry in zip(names, entries, strict=True):
                assert close(entry, getattr(expected, name), 1e-10), name
            for first, entry in zip(results[0][0], entries, strict=True):
                assert torch.equal(first, entry)


def test_repeated_samples_count_once_in_one_process() -> None:
    problem, rows, _ = make("tall", True, False)
    again = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 3, 3])
    padded = problem.with_(initial=problem.initial[again], target=problem.target[again])
    result = leave_one_out_primal(padded, Features(rows[again], again))
    assert close(result.residual, leave_one_out_primal(problem, Features(rows)).residual)
    assert first_copies(again, Reducer()).sum() == 12


def test_what_cannot_be_solved_is_refused_with_the_numbers() -> None:
    problem, rows, _ = make("tall", False, False)
    with pytest.raises(ValueError, match=r"expected features \(12, 3, D\), or \(12, 1, D\).* got \(12, 2, 8\)"):
        PrimalFactor(problem, Features(rows[:, :2]))
    wide, many, _ = make("wide", False, False)
    with pytest.raises(ValueError, match=r"ridge 1.0e-30 beside .*Set method.ridge="):
        PrimalFactor(wide.with_(ridge=1e-30), Features(1e6 * many))

    def work() -> str:
        try:
            PrimalFactor(problem, Features(rows), DistributedReducer())
        except ValueError as error:
            return str(error)
        return ""

    assert all("features of 2 ranks need the index" in text for text in run_on_ranks(2, work))
