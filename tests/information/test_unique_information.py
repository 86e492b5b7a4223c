import pytest
import torch
from torch import Tensor
from torch.distributions import MultivariateNormal, kl_divergence

from linear.dense_ridge import DenseRidge
from linear.problems import SCALES, Toy, make_toy, near, refit, without
from lqf_lightning.information.unique_information import (
    function_information,
    langevin_information,
    weight_information,
)
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import LeaveOneOut, leave_one_out
from lqf_lightning.linear.problem import QuadraticProblem

OPTIONS = {
    "plain": {},
    "intercept": {"intercept": True},
    "weights": {"weights": [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]},
}


def removed(toy: Toy) -> LeaveOneOut:
    return leave_one_out(DualFactor(toy.problem, toy.kernel, SCALES), toy.cross)


def divergences(toy: Toy, sigma: Tensor, intercept: bool = False) -> Tensor:
    """Of the smoothed weights (or weights and intercept) of n + 1 refits, as torch computes it."""
    full = refit(toy)

    def point(fit):
        return torch.cat([fit.direction[0], fit.intercept][: 1 + intercept])

    return torch.stack([
        kl_divergence(MultivariateNormal(point(full), sigma), MultivariateNormal(point(without(toy, [i])), sigma))
        for i in range(toy.problem.samples)
    ])


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_isotropic_noise_makes_it_the_divergence_of_the_weights(options):
    toy = make_toy(**options)
    sigma = 0.3**2 * torch.eye(toy.features.shape[3], dtype=torch.float64)
    assert near(weight_information(removed(toy).weight_change, 0.3), divergences(toy, sigma))


@pytest.mark.parametrize("body", [4, 30])  # 12 rows of other samples determine 8 weights, not 34
def test_fisher_noise_makes_it_that_of_the_outputs(body):
    toy, tiny = make_toy(body=body), 1e-3
    rows = toy.features_other[0].flatten(0, 1)
    fisher = rows.T @ rows / len(toy.features_other[0])
    result = removed(toy)
    whole = torch.linalg.inv(fisher + tiny * torch.eye(len(fisher)).double())
    # The regularized Fisher matrix adds its multiple of the isotropic information.
    got = function_information(result.function_change) + tiny * weight_information(result.weight_change)
    assert near(got, divergences(toy, (whole + whole.T) / 2))
    assert near(function_information(result.function_change, 2.0), function_information(result.function_change) / 4)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_langevin_noise_makes_it_that_of_weights_and_intercept(options):
    toy, step, batch, noise = make_toy(**options), 0.02, 4, 3.0
    hessian = DenseRidge(toy.problem, toy.features[0]).hessian
    sigma = step * noise**2 / (2 * batch) * torch.linalg.inv(hessian)
    got = langevin_information(removed(toy).cook, step, batch, noise)
    assert near(got, divergences(toy, (sigma + sigma.T) / 2, toy.problem.intercept))


def test_langevin_information_of_one_output_is_cooks_formula_of_residual_and_leverage():
    toy = make_toy(outputs=1, ridge=0.3)
    result, fit = removed(toy), refit(toy)
    leverage = result.leverage.flatten()
    ordinary = (toy.problem.target - fit.outputs).flatten()
    expected = 8 / (0.01 * 4) * leverage * ordinary.square() / (1 - leverage).square()
    assert near(langevin_information(result.cook, 0.01, 8, 2.0), expected)
    assert near(expected, 8 / (0.01 * 4) * leverage * result.residual.flatten().square())


def test_targets_scaled_by_c_tell_c_squared_times_as_much():
    toy = make_toy()
    target = toy.problem.initial + 3 * toy.problem.residual
    scaled = leave_one_out(DualFactor(toy.problem.with_(target=target), toy.kernel, SCALES), toy.cross)
    plain = removed(toy)
    assert near(weight_information(scaled.weight_change), 9 * weight_information(plain.weight_change))
    assert near(function_information(scaled.function_change), 9 * function_information(plain.function_change))
    assert near(langevin_information(scaled.cook, 1, 1, 1), 9 * langevin_information(plain.cook, 1, 1, 1))


def test_dropping_a_duplicate_gives_its_twin_the_information_of_a_unique_sample():
    toy, ridge = make_toy(outputs=1, ridge=0.3), 0.3

    def information(chosen: list[int]) -> Tensor:
        problem = QuadraticProblem(toy.problem.initial[chosen], toy.problem.target[chosen], ridge)
        kernel = Kernel({name: group[:, chosen][:, :, chosen] for name, group in toy.kernel.groups.items()}, 1)
        return weight_information(leave_one_out(DualFactor(problem, kernel, SCALES)).weight_change)

    both, one = information([*range(9), 0]), information([*range(1, 9), 0])
    matrix = toy.kernel.total(SCALES)[0]
    rest = matrix[1:, 1:] + ridge * torch.eye(8, dtype=torch.float64)
    unexplained = float(matrix[0, 0] - matrix[0, 1:] @ torch.linalg.solve(rest, matrix[1:, 0]))
    share = (ridge / (2 * unexplained + ridge)) ** 2
    assert share < 0.01
    assert float(both[0]) == pytest.approx(share * float(one[8]), rel=1e-9)
    assert float(both[9]) == pytest.approx(float(both[0]), rel=1e-9)
    assert near(one[8], information(list(range(9)))[0])


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_noise_that_is_none_is_refused(value):
    change = torch.ones(2)
    with pytest.raises(ValueError, match="`sigma` must be positive and finite"):
        weight_information(change, value)
    with pytest.raises(ValueError, match="`sigma` must be positive and finite"):
        function_information(change, value)
    with pytest.raises(ValueError, match="`noise` must be positive and finite"):
        langevin_information(change, 0.1, 2, value)
    with pytest.raises(ValueError, match="`step` must be positive and finite"):
        langevin_information(change, value, 2, 1.0)
    with pytest.raises(ValueError, match="`batch` must be positive"):
        langevin_information(change, 0.1, 0, 1.0)
