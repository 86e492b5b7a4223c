import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor

from linear.nets import build_net, dense_jacobian
from lqf_lightning.linear import DistributedReducer, LinearizedModel
from lqf_lightning.linear.features import Features
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.primal import PrimalFactor
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.sketch import CoordinateSketch, DenseSketch, KroneckerSketch, Sketch, SparseSketch
from lqf_lightning.linear.sketched_features import (
    effective_dimension,
    expected_error,
    sketch_features,
    solve_sketched,
)
from ranks import run_on_ranks

SHAPES = {"matrix": (12, 10), "conv": (6, 5, 3, 3), "vector": (40,), "scalar": ()}
KINDS = [DenseSketch(30), SparseSketch(30), CoordinateSketch(30), KroneckerSketch(4)]
COUNT = sum(map(math.prod, SHAPES.values()))


def draw_rows(count: int = 4, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(count, math.prod(s), generator=generator, dtype=torch.float64) + 0.5 for n, s in SHAPES.items()
    }


def kind_name(sketch: Sketch) -> str:
    return type(sketch).__name__


@pytest.fixture(params=KINDS, ids=kind_name)
def sketch(request: pytest.FixtureRequest) -> Any:
    return request.param


def test_inner_products_are_right_on_average(sketch: Sketch) -> None:
    rows = draw_rows()
    whole = torch.cat(list(rows.values()), 1)
    exact = whole @ whole.T
    samples = []
    for seed in range(400):
        mapped = type(sketch)(sketch.size, seed).apply(rows, SHAPES)
        assert mapped.shape == (4, sketch.width(SHAPES))
        samples.append(mapped @ mapped.T)
    kernels = torch.stack(samples)
    error = kernels.std(0) / 20  # of the mean of 400
    assert (error > 0).all()
    # Ten distinct entries: one in 370 lies beyond three standard errors.
    assert ((kernels.mean(0) - exact).abs() <= 3 * error).all()


@pytest.mark.parametrize("kind", [DenseSketch, SparseSketch, CoordinateSketch])
def test_as_many_columns_as_parameters_are_exact(kind: Any) -> None:
    rows = draw_rows()
    whole = torch.cat(list(rows.values()), 1)
    mapped = kind(COUNT).apply(rows, SHAPES)
    assert mapped.shape == whole.shape
    assert torch.allclose(mapped @ mapped.T, whole @ whole.T, rtol=1e-12)


def test_kronecker_sketch_of_full_rank_is_exact_and_keeps_small_parameters() -> None:
    rows = draw_rows()
    whole = torch.cat(list(rows.values()), 1)
    mapped = KroneckerSketch(45).apply(rows, SHAPES)
    assert torch.allclose(mapped @ mapped.T, whole @ whole.T, rtol=1e-12)
    assert KroneckerSketch(4).width(SHAPES) == 16 + 16 + 4 + 1
    small = {"vector": (16,)}
    part = {"vector": rows["vector"][:, :16]}
    assert torch.equal(KroneckerSketch(4).apply(part, small), part["vector"])


def test_dense_sketch_has_the_variance_that_it_promises() -> None:
    shape = {"matrix": (2000,)}
    u, v = torch.randn(2, 1, 2000, generator=torch.Generator().manual_seed(1), dtype=torch.float64).unbind()
    both = {"matrix": torch.cat([u, v])}
    products = []
    for seed in range(600):
        mapped = DenseSketch(50, seed).apply(both, shape)
        products.append(mapped[0] @ mapped[1])
    expected = (u.square().sum() * v.square().sum() + (u @ v.T).square()) / 50
    # The variance of 600 draws has a relative error of sqrt(2 / 600).
    assert abs(torch.stack(products).var() / expected - 1) <= 3 * math.sqrt(2 / 600)


def test_same_seed_gives_the_same_map_for_any_batch(sketch: Sketch) -> None:
    rows = draw_rows()
    parts = [sketch.apply({n: r[cut] for n, r in rows.items()}, SHAPES) for cut in (slice(0, 1), slice(1, 4))]
    assert torch.allclose(torch.cat(parts), sketch.apply(rows, SHAPES), rtol=1e-12)
    other = type(sketch)(sketch.size, 1).apply(rows, SHAPES)
    assert not torch.allclose(other, sketch.apply(rows, SHAPES))


def test_coordinates_are_spread_over_the_parameters() -> None:
    assert CoordinateSketch(44).width(SHAPES) == round(120 * 44 / COUNT) + round(270 * 44 / COUNT) + 4 + 1
    rows = {"matrix": torch.arange(120.0)[None]}
    mapped = CoordinateSketch(30).apply(rows, {"matrix": (12, 10)})[0] / 2  # the root of 120 / 30
    assert len(set(mapped.tolist())) == 30
    assert set(mapped.tolist()) <= set(range(120))


def test_effective_dimension_is_the_number_of_dense_columns() -> None:
    rows = {"matrix": torch.randn(60, 3000, generator=torch.Generator().manual_seed(2), dtype=torch.float64)}
    measured = []
    for seed in range(4):
        copies = [DenseSketch(100, 2 * seed + k).apply(rows, {"matrix": (3000,)}) for k in range(2)]
        measured.append(effective_dimension(torch.stack(copies)))
    assert abs(sum(measured) / 4 / 200 - 1) <= 0.1
    same = torch.randn(1, 5, 3).expand(2, 5, 3)
    assert effective_dimension(same) == math.inf


def exact_jacobian(net: Any, x: Tensor) -> Tensor:
    return torch.cat([entry.flatten(2) for entry in dense_jacobian(net, x).values()], 2)


@pytest.mark.parametrize("kind", ["residual", "depthwise"])
@pytest.mark.parametrize("batched", [False, True])
def test_exact_sketch_of_a_network_is_its_jacobian(kind: str, batched: bool, x: Tensor) -> None:
    net = build_net(kind)
    jacobian = exact_jacobian(net, x)
    model, whole = LinearizedModel(net, example=x), DenseSketch(10**6)
    sketched = sketch_features(model, x.split(2), whole, index=torch.arange(5), batched=batched)
    assert sketched.effective_dimension == math.inf
    kernel = sketched.kernel().total()[0]
    expected = jacobian.flatten(0, 1) @ jacobian.flatten(0, 1).T
    assert torch.allclose(kernel, expected, rtol=1e-10, atol=1e-10 * float(expected.abs().max()))
    problem = QuadraticProblem(net(x).detach(), torch.eye(3).double()[[0, 1, 2, 0, 1]], 0.1)
    got = leave_one_out(solve_sketched(problem, sketched)).residual
    want = leave_one_out(PrimalFactor(problem, Features(jacobian))).residual
    assert (got - want).norm() <= 1e-8 * want.norm()


def test_exact_last_layer_takes_its_share_out_of_the_error(x: Tensor) -> None:
    net = build_net("residual")
    model, jacobian = LinearizedModel(net, example=x), dense_jacobian(net, x)
    head = torch.cat([jacobian[name].flatten(2) for name in ("6.weight", "6.bias")], 2).flatten(0, 1)
    exact, whole = Kernel({"head": (head @ head.T)[None]}, 3), exact_jacobian(net, x).flatten(0, 1)
    truth = whole @ whole.T
    scale, errors, predicted = truth.square().sum() + truth.trace().square(), [], []
    for seed in range(20):
        body = sketch_features(model, [x], SparseSketch(60, seed), names=[n for n in jacobian if n[0] != "6"], copies=4)
        errors.append((body.kernel(exact).total()[0] - truth).square().sum())
        predicted.append(1 / body.combined_dimension(exact))
        assert body.combined_dimension(exact) > body.effective_dimension
    ratio = sum(predicted) / (sum(errors) / scale)
    assert 0.8 <= ratio <= 1.25
    with pytest.raises(ValueError, match=r"full kernel of 3 outputs without a group 'sketch', got a full one of 3"):
        body.kernel(body.kernel())


def test_unfit_sketches_are_refused_with_the_numbers(x: Tensor) -> None:
    net = build_net("residual")
    sketched = sketch_features(LinearizedModel(net, example=x), [x], SparseSketch(20))
    problem = QuadraticProblem(net(x).detach(), torch.eye(3).double()[[0, 1, 2, 0, 1]], 0.1)
    with pytest.raises(
        ValueError, match=r"sketch with 40 columns, worth \d+ dense ones, is unfit .* allow_approximate"
    ):
        solve_sketched(problem, sketched)
    factor = solve_sketched(problem, sketched, allow_approximate=True)
    error = expected_error(sketched.effective_dimension, factor.degrees_of_freedom)
    assert error > 0.05
    assert solve_sketched(problem, sketched, tolerance=1.01 * error).solution().outputs.shape == (5, 3)


def test_expected_error_is_that_of_leave_one_out_residuals() -> None:
    generator = torch.Generator().manual_seed(3)
    rows = torch.randn(40, 4000, generator=generator, dtype=torch.float64)
    problem = QuadraticProblem(torch.zeros(40, 1), torch.randn(40, 1, generator=generator), ridge=400.0)
    want = leave_one_out(PrimalFactor(problem, Features(rows[:, None]))).residual
    ratios = []
    for seed in range(6):
        mapped = SparseSketch(1000, seed).apply({"all": rows}, {"all": (4000,)})
        factor = PrimalFactor(problem, Features(mapped[:, None]))
        error = float((leave_one_out(factor).residual - want).norm() / want.norm())
        ratios.append(error / expected_error(1000, factor.degrees_of_freedom))
    assert 0.7 <= sum(ratios) / 6 <= 1.4


def test_ranks_sketch_alike(x: Tensor, sketch: Sketch) -> None:
    net = build_net("residual")
    whole = sketch_features(LinearizedModel(copy.deepcopy(net), example=x), x.split(2), sketch).features.rows

    def work() -> tuple[Tensor, float]:
        reducer = DistributedReducer()
        own = x[reducer.rank :: 3]
        model = LinearizedModel(copy.deepcopy(net), example=x)
        found = sketch_features(model, [own], sketch, reducer=reducer)
        return found.features.rows, found.effective_dimension

    results = run_on_ranks(3, work)
    for rank, (rows, dimension) in enumerate(results):
        assert torch.allclose(rows, whole[rank::3], rtol=1e-9, atol=1e-12)
        assert dimension == results[0][1]


def test_wrong_calls_are_refused(x: Tensor) -> None:
    model = LinearizedModel(build_net("residual"), example=x)
    with pytest.raises(ValueError, match=r"at least 2 copies, got \[\] and 1"):
        sketch_features(model, [x], DenseSketch(4), copies=1)
    with pytest.raises(ValueError, match=r"linearized parameters .* got \['nope'\]"):
        sketch_features(model, [x], DenseSketch(4), names=["nope"])
    with pytest.raises(ValueError, match="no sample"):
        sketch_features(model, [], DenseSketch(4))
    with pytest.raises(ValueError, match="positive size, got 0"):
        DenseSketch(0)
