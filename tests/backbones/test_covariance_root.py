import pytest
import torch
from torch import Tensor

from lqf_lightning.backbones.covariance_root import covariance_root


def covariance(maps: Tensor) -> Tensor:
    return torch.stack([torch.cov(part, correction=0) for part in maps])


def root_by_eigenvalues(maps: Tensor, iterations: int | None) -> Tensor:
    """The exact root, or the scalar iteration on every eigenvalue over the trace."""
    values, vectors = torch.linalg.eigh(covariance(maps))
    values = values.clamp(min=0)
    trace = values.sum(-1, keepdim=True)
    if iterations is None:
        scalars = values.sqrt()
    else:
        y, x = values / trace, torch.ones_like(values)
        for _ in range(iterations):
            y, x = y * (3 - x * y) / 2, x * (3 - x * y) / 2
        scalars = trace.sqrt() * y
    return vectors * scalars.unsqueeze(-2) @ vectors.mT


@pytest.mark.parametrize("places", [2, 4, 6, 40])
def test_it_is_the_scalar_iteration_on_the_eigenvalues_on_either_side_of_the_product(places: int) -> None:
    maps = torch.randn(3, 6, places, dtype=torch.float64) + 2.0
    torch.testing.assert_close(covariance_root(maps), root_by_eigenvalues(maps, 5), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("places", [4, 40])
def test_iterations_converge_to_the_root_whatever_the_rank(places: int) -> None:
    maps = torch.randn(3, 6, places, dtype=torch.float64)
    root = covariance_root(maps, 20)
    torch.testing.assert_close(root, root_by_eigenvalues(maps, None), rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(root @ root, covariance(maps), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("places", [4, 9])
def test_both_directions_of_differentiation_agree_with_differences_at_equal_eigenvalues(places: int) -> None:
    basis = torch.linalg.qr(torch.randn(places, places, dtype=torch.float64))[0]
    maps = torch.zeros(1, 5, places, dtype=torch.float64)
    maps[0, :3] = (basis - basis.mean(0))[:, :3].T  # three eigenvalues close to each other, two of zero
    maps[0, 1] = maps[0, 0].roll(1)
    torch.autograd.gradcheck(covariance_root, maps.requires_grad_(), check_forward_ad=True)


@pytest.mark.parametrize("places", [4, 9])
def test_a_constant_map_has_root_zero_and_a_finite_derivative(places: int) -> None:
    maps = torch.ones(1, 5, places).requires_grad_()
    root = covariance_root(maps)
    assert not root.any()
    (gradient,) = torch.autograd.grad(root.sum(), maps)
    assert gradient.isfinite().all()


def test_what_has_no_root_is_refused() -> None:
    with pytest.raises(ValueError, match=r"maps \(1, 2, 1\), expected at least two places"):
        covariance_root(torch.ones(1, 2, 1))
    with pytest.raises(ValueError, match="iterations=0, expected at least 1"):
        covariance_root(torch.ones(1, 2, 3), 0)
