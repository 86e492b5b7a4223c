import math

import pytest
import torch
from torch import Tensor

from linear.dense_ridge import near, normal
from lqf_lightning.forgetting.gaussian_information import (
    certified_information,
    cumulative_query_information,
    gaussian_kl,
    query_information,
    seed_average,
)
from lqf_lightning.forgetting.noise import DiagonalNoise, IsotropicNoise

SIZE = 6


def definite(seed: int, size: int = SIZE) -> Tensor:
    root = normal(size, size, seed=seed)
    result: Tensor = root @ root.mT / size + 0.2 * torch.eye(size, dtype=torch.float64)
    return result


def test_the_divergence_is_that_of_torch_distributions() -> None:
    change, first, second = normal(SIZE), definite(1), definite(2)
    build = torch.distributions.MultivariateNormal
    expected = torch.distributions.kl_divergence(build(change, first), build(torch.zeros_like(change), second))
    assert gaussian_kl(change, first, second) == pytest.approx(float(expected), rel=1e-12)


def test_the_divergence_is_the_expected_log_ratio_of_densities() -> None:
    change, first, second, count = 0.3 * normal(2), definite(1, 2), definite(2, 2), 20_000
    build = torch.distributions.MultivariateNormal
    sample = change + normal(count, 2, seed=3) @ torch.linalg.cholesky(first).mT
    ratio = build(change, first).log_prob(sample) - build(torch.zeros_like(change), second).log_prob(sample)
    assert abs(gaussian_kl(change, first, second) - float(ratio.mean())) < 4.5 * float(ratio.std()) / math.sqrt(count)


def test_a_diagonal_covariance_may_be_given_as_its_diagonal() -> None:
    change, first, second = normal(SIZE), normal(SIZE, seed=1).exp(), normal(SIZE, seed=2).exp()
    dense = gaussian_kl(change, torch.diag(first), torch.diag(second))
    assert gaussian_kl(change, first, second) == pytest.approx(dense, rel=1e-12)


def test_it_is_zero_for_equal_gaussians_alone() -> None:
    zero, covariance = torch.zeros(SIZE, dtype=torch.float64), definite(1)
    assert gaussian_kl(zero, covariance, covariance) < 1e-28
    assert gaussian_kl(zero, covariance.diag(), covariance.diag()) == 0.0
    assert gaussian_kl(1e-6 * normal(SIZE), covariance, covariance) > 1e-13
    assert gaussian_kl(zero, covariance, (1 + 1e-5) * covariance) == pytest.approx(0.25 * SIZE * 1e-10, rel=1e-4)
    assert all(gaussian_kl(normal(SIZE, seed=k), definite(k), definite(k + 1)) > 0 for k in range(20))


def test_equal_noise_leaves_half_the_squared_change_over_the_variance() -> None:
    change = normal(SIZE)
    for sigma in (0.1, 0.2):
        variance = torch.full((SIZE,), sigma**2, dtype=torch.float64)
        expected = float(change.square().sum()) / (2 * sigma**2)
        assert gaussian_kl(change, variance, variance) == pytest.approx(expected, rel=1e-13)
        assert IsotropicNoise(sigma).information({"w": change}) == pytest.approx(expected, rel=1e-13)


def test_it_does_not_depend_on_the_coordinates() -> None:
    change, first, second, turn = normal(SIZE), definite(1), definite(2), normal(SIZE, SIZE, seed=3)
    moved = gaussian_kl(turn @ change, turn @ first @ turn.mT, turn @ second @ turn.mT)
    assert moved == pytest.approx(gaussian_kl(change, first, second), rel=1e-10)


def test_it_is_half_of_what_code_without_the_half_reports() -> None:
    change, first, second = normal(SIZE), normal(SIZE, seed=1).exp(), normal(SIZE, seed=2).exp()
    published = float((change.square() / second + first / second - (first / second).log() - 1).sum())
    assert 2 * gaussian_kl(change, first, second) == pytest.approx(published, rel=1e-12)


def test_covariances_of_other_shapes_or_signs_are_refused() -> None:
    with pytest.raises(ValueError, match=r"two covariances of shape \(2,\) or \(2, 2\), got \(3,\) and \(2,\)"):
        gaussian_kl(torch.zeros(2), torch.ones(3), torch.ones(2))
    with pytest.raises(ValueError, match="reference must be positive definite"):
        gaussian_kl(torch.zeros(2), torch.ones(2), torch.tensor([1.0, 0.0]))
    with pytest.raises(ValueError, match="the covariance must be positive definite"):
        gaussian_kl(torch.zeros(2), -torch.eye(2), torch.eye(2))


def retained_optimum(rows: Tensor, target: Tensor, ridge: float) -> tuple[Tensor, Tensor]:
    hessian = rows.mT @ rows / len(rows) + ridge * torch.eye(rows.shape[1], dtype=torch.float64)
    return hessian, torch.linalg.solve(hessian, rows.mT @ target / len(rows))


def test_an_exact_scrub_leaves_nothing_whatever_the_noise() -> None:
    rows, target, weights = normal(20, SIZE), normal(20, seed=1), normal(SIZE, seed=2)
    hessian, retrained = retained_optimum(rows[3:], target[3:], 0.1)
    gradient = hessian @ weights - rows[3:].mT @ target[3:] / 17
    scrubbed = weights - torch.linalg.solve(hessian, gradient)
    wrong = weights - torch.linalg.solve(17 * hessian, gradient)  # the Hessian of a sum, the gradient of a mean
    for sigma in (1e-1, 1e-3, 1e-6):
        noise = IsotropicNoise(sigma)
        # Rounding of the two solutions, eps times their condition, below 1e-13, over the noise.
        assert noise.information({"w": scrubbed - retrained}) < (1e-13 / sigma) ** 2
        assert noise.information({"w": wrong - retrained}) > 0.1
    assert certified_information(noise, 0.0) == 0.0


def test_the_certificate_is_never_below_the_truth_and_tight_for_isotropic_noise() -> None:
    change, intercept = normal(SIZE), normal(2, seed=1)
    both = {"w": change, "intercept": intercept}
    lengths = float(change.norm()), float(intercept.norm())
    isotropic = IsotropicNoise(0.3)
    assert certified_information(isotropic, *lengths) == pytest.approx(isotropic.information(both), rel=1e-12)
    shaped = DiagonalNoise({"w": normal(SIZE, seed=2).exp(), "intercept": normal(2, seed=3).exp()})
    assert certified_information(shaped, *lengths) > shaped.information(both)


def test_without_noise_any_distance_tells_all() -> None:
    assert certified_information(None, 1e-9) == math.inf
    assert certified_information(None, 0.0, 1e-9) == math.inf
    assert certified_information(None, 0.0) == 0.0
    with pytest.raises(ValueError, match="must not be negative, got nan and 0"):
        certified_information(None, math.nan)


def answers(queries: int, seed: int) -> tuple[Tensor, Tensor, float]:
    """Change and covariance of the answers to random queries, and what the weights tell."""
    jacobian, change, covariance = normal(queries, SIZE, seed=seed), normal(SIZE, seed=1), definite(2)
    whole = 0.5 * float(change @ torch.linalg.solve(covariance, change))
    return jacobian @ change, jacobian @ covariance @ jacobian.mT, whole


@pytest.mark.parametrize("seed", range(3, 8))
def test_answers_never_tell_more_than_weights_and_all_once_the_queries_span_them(seed: int) -> None:
    change, covariance, whole = answers(10, seed)
    told = cumulative_query_information(change, covariance)
    assert bool((told.diff() >= 0).all())
    assert bool((told[: SIZE - 1] < whole * (1 - 1e-6)).all())
    # Rounding grows with the condition of J Sigma J^T, below 1e6 for these draws.
    assert near(told[SIZE - 1 :], torch.full((5,), whole, dtype=torch.float64), 1e-8)


def test_leading_parts_are_what_they_are_alone() -> None:
    change, covariance, _ = answers(8, 3)
    told = cumulative_query_information(change, covariance)
    for count in range(1, SIZE + 1):
        part = covariance[:count, :count]
        expected = 0.5 * float(change[:count] @ torch.linalg.solve(part, change[:count]))
        assert float(told[count - 1]) == pytest.approx(expected, rel=1e-8)
        assert query_information(change[:count], part) == pytest.approx(expected, rel=1e-8)


def test_outputs_tell_half_of_what_code_without_the_half_reports() -> None:
    change, variance = normal(4), normal(4, seed=1).exp()
    published = float((change.square() / variance + 1 - 1).sum())  # equal noise: the other terms cancel
    assert 2 * query_information(change, torch.diag(variance)) == pytest.approx(published, rel=1e-12)


def test_asking_again_tells_nothing_new() -> None:
    change, covariance, _ = answers(3, 3)
    twice = [0, 0, 1, 2, 1, 2]
    told = cumulative_query_information(change[twice], covariance[twice][:, twice])
    once = cumulative_query_information(change, covariance)
    assert near(told, once[twice].cummax(0).values, 1e-12)


def test_joint_answers_may_tell_more_than_the_sum_of_single_ones() -> None:
    change = torch.tensor([1.0, -1.0])
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])
    singles = sum(query_information(change[k : k + 1], covariance[k : k + 1, k : k + 1]) for k in range(2))
    assert query_information(change, covariance) > 5 * singles


def test_answers_without_noise_that_differ_tell_everything() -> None:
    assert query_information(torch.tensor([1.0, 1.0]), torch.diag(torch.tensor([1.0, 0.0]))) == math.inf
    assert query_information(torch.tensor([1.0, 0.0]), torch.diag(torch.tensor([1.0, 0.0]))) == 0.5
    assert query_information(torch.tensor([1.0, 2.0]), torch.ones(2, 2)) == math.inf


def test_no_query_is_refused() -> None:
    with pytest.raises(ValueError, match=r"expected a covariance \(0, 0\) of at least 1 query"):
        query_information(torch.zeros(0), torch.zeros(0, 0))
    with pytest.raises(ValueError, match=r"expected a covariance \(2, 2\).* got \(2,\)"):
        query_information(torch.zeros(2), torch.ones(2))


def test_mixtures_over_seeds_differ_less_than_their_parts() -> None:
    scrubbed, retrained = (normal(5, 8, seed=seed).softmax(1) for seed in (1, 2))
    per_seed = (scrubbed * (scrubbed / retrained).log()).sum(1)
    mixed, other = scrubbed.mean(0), retrained.mean(0)
    mixtures = float((mixed * (mixed / other).log()).sum())
    assert 0 < mixtures < seed_average(per_seed.tolist())
    assert seed_average(per_seed.tolist()) == pytest.approx(float(per_seed.mean()), rel=1e-14)


@pytest.mark.parametrize("odd", [[], [1.0, -0.1], [math.nan]])
def test_an_average_needs_information(odd: list[float]) -> None:
    with pytest.raises(ValueError, match="information of at least one seed, none of it negative"):
        seed_average(odd)
