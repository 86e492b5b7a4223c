import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from lqf_lightning.teachers.agreement import byol_regression


def draw(seed: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


ONE, OTHER = draw(1), draw(2)


def test_it_is_two_minus_two_cosines() -> None:
    cosines = [float(a @ b) / (float(a @ a) * float(b @ b)) ** 0.5 for a, b in zip(ONE, OTHER, strict=True)]
    expected = sum(2 - 2 * cosine for cosine in cosines) / 6
    assert byol_regression(ONE, OTHER).item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_same_vectors_agree_exactly(dtype: torch.dtype) -> None:
    assert byol_regression(draw(1, dtype), draw(1, dtype)).item() == 0


def test_opposite_vectors_are_four_apart() -> None:
    assert byol_regression(ONE, -3 * ONE).item() == pytest.approx(4, rel=1e-12)


@pytest.mark.parametrize("scale", [1e-6, 0.1, 7.0, 1e12])
def test_lengths_do_not_count(scale: float) -> None:
    expected = byol_regression(ONE, OTHER).item()
    factors = scale * torch.arange(1.0, 7.0).unsqueeze(1)
    assert byol_regression(factors * ONE, OTHER).item() == pytest.approx(expected, rel=1e-12)
    assert byol_regression(ONE, factors * OTHER).item() == pytest.approx(expected, rel=1e-12)


def test_small_differences_are_not_rounding() -> None:
    """2 - 2 cos of directions 1e-4 apart is 1e-8, less than what single precision resolves next to 2."""
    angle = 1e-4
    got = byol_regression(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, angle]]))
    assert got.item() == pytest.approx(angle**2, rel=1e-3)


def test_gradients_are_those_of_finite_differences() -> None:
    assert torch.autograd.gradcheck(byol_regression, (ONE.clone().requires_grad_(), OTHER.clone().requires_grad_()))


def test_only_the_direction_is_pulled() -> None:
    prediction = ONE.clone().requires_grad_()
    byol_regression(prediction, OTHER).backward()
    assert prediction.grad is not None
    torch.testing.assert_close((prediction.grad * ONE).sum(1), torch.zeros(6, dtype=torch.float64))


@pytest.mark.parametrize("length", [0.0, 1e-38, 1e-20, 1e-9])
def test_gradients_of_tiny_vectors_are_finite(length: float) -> None:
    prediction = (length * F.normalize(draw(1, torch.float32), dim=1)).requires_grad_()
    loss = byol_regression(prediction, draw(2, torch.float32))
    loss.backward()
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()
    assert 0 <= loss.item() <= 4


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_computed_in_single(dtype: torch.dtype) -> None:
    """Squares of 300 overflow half precision."""
    prediction, target = (300 * draw(1, dtype)).requires_grad_(), draw(2, dtype)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = byol_regression(prediction, target)
    loss.backward()
    expected = byol_regression(prediction.detach().double(), target.double()).item()
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(expected, rel=1e-5)
    assert prediction.grad is not None
    assert prediction.grad.isfinite().all()


def test_an_empty_batch_costs_nothing() -> None:
    prediction = ONE[:0].clone().requires_grad_()
    loss = byol_regression(prediction, OTHER[:0])
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize("target", [OTHER[:1], OTHER[:, :1], OTHER[0]])
def test_shapes_that_would_broadcast_are_refused(target: Tensor) -> None:
    with pytest.raises(ValueError, match=r"one shape \(B, D\), got \(6, 4\)"):
        byol_regression(ONE, target)
