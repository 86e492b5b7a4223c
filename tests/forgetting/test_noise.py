import math

import pytest
import torch
from torch import Tensor

from linear.dense_ridge import flat, normal
from lqf_lightning.forgetting.noise import DiagonalNoise, IsotropicNoise, Noise, worst_case

LIKE = {"body.weight": torch.zeros(3, 2, dtype=torch.float64), "bias": torch.zeros(4, dtype=torch.float64)}
VARIANCE = {"body.weight": normal(3, 2).exp(), "bias": normal(4, seed=1).exp()}
NOISES = [IsotropicNoise(0.3), DiagonalNoise(VARIANCE)]


def variances(noise: Noise) -> Tensor:
    return flat(noise.variance) if isinstance(noise, DiagonalNoise) else torch.full((10,), 0.09, dtype=torch.float64)


def draws(noise: Noise, count: int) -> Tensor:
    return torch.stack([flat(noise.draw(LIKE, seed)) for seed in range(count)])


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
def test_draws_have_the_covariance_that_is_claimed(noise: Noise) -> None:
    count = 4000
    sample, claimed = draws(noise, count), torch.diag(variances(noise))
    # Of n Gaussian draws with known mean 0, entry ij of the covariance has variance (S_ii S_jj + S_ij^2) / n.
    error = ((claimed.diag().outer(claimed.diag()) + claimed.square()) / count).sqrt()
    assert float(((sample.mT @ sample / count - claimed) / error).abs().max()) < 4.5
    assert float((sample.mean(0) / (claimed.diag() / count).sqrt()).abs().max()) < 4.5


def test_sigma_is_the_standard_deviation_and_not_the_variance() -> None:
    sample = IsotropicNoise(0.01).draw({"w": torch.zeros(40_000, dtype=torch.float64)}, 0)["w"]
    assert float(sample.std()) == pytest.approx(0.01, rel=5 / math.sqrt(2 * 40_000))


def test_a_draw_depends_on_seed_and_name_alone() -> None:
    noise = IsotropicNoise(1.0)
    first = noise.draw(LIKE, 7)
    torch.manual_seed(123)
    torch.randn(5)
    backward = noise.draw(dict(reversed(LIKE.items())), 7)
    assert all(torch.equal(first[name], backward[name]) for name in LIKE)
    assert torch.equal(noise.draw({"bias": LIKE["bias"]}, 7)["bias"], first["bias"])
    assert not torch.equal(noise.draw(LIKE, 8)["bias"], first["bias"])
    same_shape = noise.draw({"a": torch.zeros(4), "b": torch.zeros(4)}, 7)
    assert not torch.equal(same_shape["a"], same_shape["b"])


@pytest.mark.parametrize("bit", [0, 31, 32, 40, 61])
def test_every_bit_of_the_seed_counts_so_that_noise_is_not_found_by_trying_seeds(bit: int) -> None:
    seed = 0b10110011 << 24
    first, second = (IsotropicNoise(1.0).draw({"bias": torch.zeros(6)}, s)["bias"] for s in (seed, seed ^ (1 << bit)))
    assert not bool((first == second).any())


def test_noise_is_normal_up_to_the_tails_and_finite() -> None:
    count = 200_000
    sample = IsotropicNoise(1.0).draw({"w": torch.zeros(count, dtype=torch.float64)}, 5)["w"].sort().values
    levels = (torch.arange(count, dtype=torch.float64) + 0.5) / count
    distance = float((torch.special.ndtr(sample) - levels).abs().max()) * math.sqrt(count)
    assert distance < 1.95  # Kolmogorov-Smirnov, one in a thousand
    assert float(sample.abs().max()) > 4
    assert bool(sample.isfinite().all())
    assert IsotropicNoise(1.0).draw({"empty": torch.zeros(0, 3)}, 5)["empty"].shape == (0, 3)


def test_single_precision_weights_get_the_same_noise_rounded() -> None:
    wide, narrow = ({name: entry.to(kind) for name, entry in LIKE.items()} for kind in (torch.float64, torch.float32))
    noise = IsotropicNoise(0.1)
    rounded = noise.draw(narrow, 3)
    assert all(torch.equal(entry.float(), rounded[name]) for name, entry in noise.draw(wide, 3).items())


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
def test_information_is_half_the_squared_length_in_the_inverse_covariance(noise: Noise) -> None:
    change = {"body.weight": normal(3, 2, seed=2), "bias": normal(4, seed=3)}
    expected = 0.5 * float((flat(change).square() / variances(noise)).sum())
    assert noise.information(change) == pytest.approx(expected, rel=1e-13)
    tenfold = {name: 10 * entry for name, entry in change.items()}
    assert noise.information(tenfold) == pytest.approx(100 * expected, rel=1e-13)


@pytest.mark.parametrize("noise", NOISES, ids=lambda noise: type(noise).__name__)
def test_no_change_of_a_length_tells_more_than_the_worst_and_one_tells_as_much(noise: Noise) -> None:
    length = 0.7
    directions = torch.cat([normal(200, 10, seed=4), torch.eye(10, dtype=torch.float64)])
    told = []
    for direction in length * directions / directions.norm(dim=1, keepdim=True):
        told.append(noise.information({"body.weight": direction[:6].view(3, 2), "bias": direction[6:]}))
    assert max(told) == pytest.approx(noise.worst_information(length), rel=1e-12)


def test_diagonal_noise_is_optimal_for_a_diagonal_curvature() -> None:
    curvature = {"w": torch.tensor([0.5, 4.0], dtype=torch.float64)}
    variance = DiagonalNoise.optimal(curvature, 3.0).variance["w"]
    assert torch.allclose(variance.square() * curvature["w"], torch.full((2,), 9.0).double(), rtol=1e-14)


def test_diagonal_noise_with_equal_variances_is_isotropic() -> None:
    equal = DiagonalNoise({name: torch.full_like(entry, 0.04) for name, entry in LIKE.items()})
    drawn, expected = equal.draw(LIKE, 5), IsotropicNoise(0.2).draw(LIKE, 5)
    assert all(torch.allclose(drawn[name], expected[name], rtol=1e-14, atol=0) for name in LIKE)


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.nan, math.inf])
def test_no_noise_is_not_noise(sigma: float) -> None:
    with pytest.raises(ValueError, match="standard deviation of noise must be positive and finite"):
        IsotropicNoise(sigma)


@pytest.mark.parametrize("odd", [0.0, -1.0, math.nan, math.inf])
def test_variances_scales_and_curvatures_must_be_positive(odd: float) -> None:
    with pytest.raises(ValueError, match=r"some of 'bias' are not"):
        DiagonalNoise({"bias": torch.tensor([1.0, odd])})
    with pytest.raises(ValueError, match="scale of noise must be positive"):
        DiagonalNoise.optimal({"bias": torch.ones(1)}, odd)
    with pytest.raises(ValueError, match="curvature of 'bias' must be positive and finite: add the ridge"):
        DiagonalNoise.optimal({"bias": torch.tensor([odd])}, 1.0)


def test_weights_without_a_variance_are_refused() -> None:
    with pytest.raises(ValueError, match="first odd one is 'head'"):
        DiagonalNoise(VARIANCE).draw(LIKE | {"head": torch.zeros(1)}, 0)
    with pytest.raises(ValueError, match=r"first odd one is 'body.weight'"):
        DiagonalNoise(VARIANCE).information({"bias": torch.zeros(4)})


def test_a_distance_without_bound_tells_everything_and_a_negative_one_is_refused() -> None:
    assert worst_case(math.inf, 1.0) == math.inf
    assert worst_case(0.0, 1.0) == 0.0
    for odd in (-1.0, math.nan):
        with pytest.raises(ValueError, match="must not be negative"):
            worst_case(odd, 1.0)
