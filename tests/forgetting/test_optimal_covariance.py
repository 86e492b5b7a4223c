import pytest
import torch
from torch import Tensor

from linear.dense_ridge import near, normal
from lqf_lightning.forgetting.optimal_covariance import optimal_covariance

SIZE, STRENGTH = 7, 0.3


def definite(seed: int) -> Tensor:
    root = normal(SIZE, SIZE, seed=seed)
    result: Tensor = root @ root.mT / SIZE + 0.1 * torch.eye(SIZE, dtype=torch.float64)
    return result


def cost(curvature: Tensor, residual: Tensor, covariance: Tensor) -> float:
    return float(
        0.5 * torch.trace(curvature @ covariance)
        + 0.5 * STRENGTH * torch.trace(residual @ torch.linalg.inv(covariance))
    )


def test_the_optimum_solves_its_equation_and_is_a_covariance() -> None:
    curvature, residual = definite(0), definite(1)
    covariance = optimal_covariance(curvature, residual, STRENGTH)
    assert near(covariance @ curvature @ covariance, STRENGTH * residual, 1e-12)
    assert torch.equal(covariance, covariance.mT)
    assert float(torch.linalg.eigvalsh(covariance)[0]) > 0


def test_no_other_covariance_costs_less() -> None:
    curvature, residual = definite(0), definite(1)
    covariance = optimal_covariance(curvature, residual, STRENGTH)
    least = cost(curvature, residual, covariance)
    assert all(cost(curvature, residual, definite(seed)) > least for seed in range(2, 50))
    for seed in range(50, 70):  # near it, too: the minimum is strict, so second order in the step
        step = 1e-3 * (definite(seed) - definite(seed + 100))
        assert cost(curvature, residual, covariance + step) > least


def test_an_isotropic_residual_gives_the_inverse_root_and_the_known_minimum() -> None:
    curvature, deviation = definite(0), 0.2
    residual = deviation**2 * torch.eye(SIZE, dtype=torch.float64)
    values, basis = torch.linalg.eigh(curvature)
    scale = STRENGTH**0.5 * deviation
    covariance = optimal_covariance(curvature, residual, STRENGTH)
    assert near(covariance, scale * (basis * values.rsqrt()) @ basis.mT, 1e-12)
    assert cost(curvature, residual, covariance) == pytest.approx(scale * float(values.sqrt().sum()), rel=1e-12)


def test_directions_without_residual_need_no_noise() -> None:
    residual = torch.zeros(SIZE, SIZE, dtype=torch.float64)
    residual[0, 0] = 1.0
    covariance = optimal_covariance(torch.eye(SIZE, dtype=torch.float64), residual, STRENGTH)
    assert near(covariance, STRENGTH**0.5 * residual, 1e-12)


def test_what_is_no_curvature_or_residual_is_refused() -> None:
    identity = torch.eye(2)
    with pytest.raises(ValueError, match="strength of the information term must be positive, got 0"):
        optimal_covariance(identity, identity, 0.0)
    with pytest.raises(ValueError, match="curvature must be positive definite, its lowest eigenvalue is 0"):
        optimal_covariance(torch.zeros(2, 2), identity, 1.0)
    with pytest.raises(ValueError, match="residual must be positive semi-definite"):
        optimal_covariance(identity, -identity, 1.0)
