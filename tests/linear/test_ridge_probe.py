import pytest
import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.linear import DistributedReducer, Reducer, RidgeProbe
from ranks import run_on_ranks

RIDGES = [1e-6, 1e-2, 1.0, 50.0]


def sample(number: int = 40, features: int = 6, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features with unequal variances and means that are far from zero."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-1, 1, features, dtype=torch.float64)
    x = torch.randn(number, features, generator=generator, dtype=torch.float64) * scale + 5
    return x, torch.randint(0, 3, (number,), generator=generator)


def fitted(*batches: tuple[Tensor, Tensor]) -> RidgeProbe:
    probe = RidgeProbe(batches[0][0].shape[1], 3)
    for x, target in batches:
        probe.update(x, target)
    return probe


def by_normal_equations(x: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    """The intercept is not penalized: center both sides, solve, then put the means back."""
    wanted = one_hot(target, 3).double()
    centered, mean = x - x.mean(0), x.mean(0)
    damping = ridge * x.var(0, correction=0).mean()
    hessian = centered.T @ centered / len(x) + damping * torch.eye(x.shape[1], dtype=torch.float64)
    weight = torch.linalg.solve(hessian, centered.T @ (wanted - wanted.mean(0)) / len(x)).T
    return weight, wanted.mean(0) - weight @ mean


def test_every_ridge_solves_its_normal_equations() -> None:
    x, target = sample()
    weight, bias = fitted((x, target)).solve(RIDGES)
    assert weight.shape == (4, 3, 6)
    for ridge, w, b in zip(RIDGES, weight, bias, strict=True):
        expected_w, expected_b = by_normal_equations(x, target, ridge)
        assert torch.allclose(w, expected_w, rtol=1e-8, atol=1e-11)
        assert torch.allclose(b, expected_b, rtol=1e-8, atol=1e-11)


def test_the_gradient_of_the_documented_objective_vanishes() -> None:
    x, target = sample()
    weight, bias = (value[0].clone().requires_grad_() for value in fitted((x, target)).solve([0.3]))
    data = (x @ weight.T + bias - one_hot(target, 3)).square().sum() / (2 * len(x))
    (data + 0.5 * 0.3 * x.var(0, correction=0).mean() * weight.square().sum()).backward()
    assert max(weight.grad.abs().max(), bias.grad.abs().max()) < 1e-13  # type: ignore[union-attr]


def test_a_vanishing_ridge_is_least_squares() -> None:
    x, target = sample()
    weight, bias = fitted((x, target)).solve([1e-14])
    rows = torch.cat([x, torch.ones(len(x), 1, dtype=torch.float64)], 1)
    expected = torch.linalg.lstsq(rows, one_hot(target, 3).double()).solution
    assert torch.allclose(torch.cat([weight[0].T, bias], 0), expected, rtol=1e-7, atol=1e-9)


def test_a_vanishing_ridge_takes_the_shortest_of_many_solutions() -> None:
    x, target = sample(number=5, features=9)
    weight, bias = fitted((x, target)).solve([1e-8])
    wanted = one_hot(target, 3).double()
    shortest = torch.linalg.pinv(x - x.mean(0)) @ (wanted - wanted.mean(0))
    assert torch.allclose(weight[0].T, shortest, rtol=1e-5, atol=1e-6)
    assert torch.allclose(x @ weight[0].T + bias, wanted, atol=1e-6)


def test_the_unit_of_the_features_does_not_matter() -> None:
    x, target = sample()
    weight, bias = fitted((x, target)).solve(RIDGES)
    scaled, same = fitted((1000 * x, target)).solve(RIDGES)
    assert torch.allclose(1000 * scaled, weight, rtol=1e-8, atol=1e-11)
    assert torch.allclose(same, bias, rtol=1e-8, atol=1e-10)


def test_a_shift_of_the_features_changes_the_intercept_only() -> None:
    x, target = sample()
    weight, bias = fitted((x, target)).solve([0.1])
    shifted, moved = fitted((x + 100, target)).solve([0.1])
    assert torch.allclose(shifted, weight, rtol=1e-7, atol=1e-10)
    assert torch.allclose(moved, bias - 100 * weight.sum(-1), rtol=1e-7, atol=1e-8)


@pytest.mark.parametrize("value", [0.0, 0.1, 1.0, -7.3])
def test_features_that_say_nothing_leave_the_shares_of_the_classes(value: float) -> None:
    _, target = sample()
    constant = torch.full((40, 6), value, dtype=torch.float64)
    weight, bias = fitted((constant, target)).solve(RIDGES)
    shares = one_hot(target, 3).double().mean(0)
    assert torch.allclose(torch.einsum("rcf,bf->rbc", weight, constant) + bias[:, None], shares.expand(4, 40, 3))


class _Fold(Reducer):
    """Adds the sums of another process that has finished before."""

    def __init__(self, other: RidgeProbe) -> None:
        self.others = [other._second, other._cross]

    def sum_(self, tensor: Tensor) -> Tensor:
        return tensor.add_(self.others.pop(0))


def test_sums_of_two_halves_are_those_of_the_whole() -> None:
    x, target = sample()
    first, second = fitted((x[:13], target[:13])), fitted((x[13:], target[13:]))
    first.reduce(_Fold(second))
    for got, want in zip(first.solve(RIDGES), fitted((x, target)).solve(RIDGES), strict=True):
        assert torch.allclose(got, want, rtol=1e-8, atol=1e-11)


def test_uneven_ranks_find_the_solution_of_all_samples() -> None:
    x, target = sample()

    def solve() -> tuple[Tensor, Tensor]:
        reducer = DistributedReducer()
        mine = [slice(0, 30), slice(30, 40), slice(0, 0)][reducer.rank]
        probe = fitted((x[mine], target[mine]))
        probe.reduce(reducer)
        return probe.solve(RIDGES)

    expected = fitted((x, target)).solve(RIDGES)
    for got in run_on_ranks(3, solve):
        assert all(torch.allclose(a, b, rtol=1e-8, atol=1e-11) for a, b in zip(got, expected, strict=True))


def test_single_precision_features_are_summed_in_double() -> None:
    x, target = sample()
    weight, _ = fitted((x.float(), target)).solve([1e-3])
    assert weight.dtype == torch.float64
    assert torch.equal(weight, fitted((x.float().double(), target)).solve([1e-3])[0])


@pytest.mark.parametrize("ridges", [[], [0.1, 0.0], [-1.0], [float("nan")]])
def test_ridges_that_are_not_positive_name_the_override(ridges: list[float]) -> None:
    with pytest.raises(ValueError, match=r"got \[.*callbacks\.linear_probe\.ridges"):
        fitted(sample()).solve(ridges)


def test_without_samples_there_is_no_solution() -> None:
    with pytest.raises(ValueError, match="no sample"):
        RidgeProbe(3, 2).solve([1.0])
