import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear.dense_ridge import flat, metric_matrix, near, normal
from linear.nets import build_net, random_direction
from lqf_lightning.forgetting.kronecker_noise import KroneckerNoise
from lqf_lightning.forgetting.noise import DiagonalNoise, IsotropicNoise
from lqf_lightning.forgetting.optimal_covariance import optimal_covariance
from lqf_lightning.forgetting.standard_normal import standard_normal
from lqf_lightning.linear import KFAC, fit_kfac
from lqf_lightning.linear.metric import KroneckerMetric
from lqf_lightning.linear.reducer import current_reducer
from ranks import run_on_ranks

EXACT = 1e-9  # relative, float64: eigenvectors of the factors against those of the whole matrix
RIDGE, SCALE = 0.05, 0.3


def powers(matrix: Tensor, power: float) -> Tensor:
    values, basis = torch.linalg.eigh(matrix)
    result: Tensor = (basis * values**power) @ basis.mT
    return result


@pytest.fixture(params=["residual", "depthwise"])
def fitted(request: pytest.FixtureRequest) -> tuple[nn.Module, KFAC, Tensor]:
    net = build_net(request.param)
    kfac = fit_kfac(net, None, [normal(5, 3, 8, 8, seed=1)], damping=1.0)
    shapes = {name: parameter.shape for name, parameter in net.named_parameters()}
    return net, kfac, metric_matrix(KroneckerMetric(kfac, RIDGE), shapes)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_a_draw_is_the_power_of_the_dense_curvature_times_normal_numbers(fitted: Any, power: float) -> None:
    net, kfac, dense = fitted
    like = random_direction(net)
    noise = KroneckerNoise(kfac, ridge=RIDGE, scale=SCALE, power=power)
    expected = math.sqrt(SCALE) * powers(dense, -power / 2) @ flat(standard_normal(like, 5))
    assert near(flat(noise.draw(like, 5), list(like)), expected, EXACT)


@pytest.mark.parametrize("power", [0.5, 1.0])
def test_information_is_that_of_the_dense_covariance(fitted: Any, power: float) -> None:
    net, kfac, dense = fitted
    change = random_direction(net)
    vector = flat(change)
    noise = KroneckerNoise(kfac, ridge=RIDGE, scale=SCALE, power=power)
    expected = 0.5 * float(vector @ powers(dense, power) @ vector) / SCALE
    assert noise.information(change) == pytest.approx(expected, rel=EXACT)


def test_the_worst_change_is_the_eigenvector_of_the_largest_curvature(fitted: Any) -> None:
    _, kfac, dense = fitted
    top = float(torch.linalg.eigvalsh(dense)[-1])
    noise = KroneckerNoise.optimal(kfac, RIDGE, SCALE)
    assert top > 1  # or the curvature 1 of an intercept would be the largest
    assert noise.worst_information(0.7) == pytest.approx(0.5 * 0.49 * math.sqrt(top) / SCALE, rel=EXACT)


def test_the_optimal_noise_solves_the_equation_of_the_optimum(fitted: Any) -> None:
    net, kfac, dense = fitted
    covariance = SCALE * powers(dense, -0.5)
    identity = torch.eye(len(dense), dtype=torch.float64)
    assert near(covariance @ dense @ covariance, SCALE**2 * identity, EXACT)
    assert near(covariance, optimal_covariance(dense, identity, SCALE**2), EXACT)
    like = random_direction(net)
    unit = powers(covariance, -0.5) @ flat(KroneckerNoise.optimal(kfac, RIDGE, SCALE).draw(like, 0), list(like))
    assert near(unit, flat(standard_normal(like, 0)), EXACT)


def test_empirical_covariance_is_within_its_error() -> None:
    net, x, count = nn.Linear(3, 2).double(), normal(6, 3), 3000
    kfac = fit_kfac(net, None, [x], damping=1.0)
    like = {name: parameter.detach() for name, parameter in net.named_parameters()}
    dense = metric_matrix(KroneckerMetric(kfac, RIDGE), {name: entry.shape for name, entry in like.items()})
    noise, claimed = KroneckerNoise.optimal(kfac, RIDGE, SCALE), SCALE * powers(dense, -0.5)
    sample = torch.stack([flat(noise.draw(like, seed)) for seed in range(count)])
    error = ((claimed.diag().outer(claimed.diag()) + claimed.square()) / count).sqrt()
    assert float(((sample.mT @ sample / count - claimed) / error).abs().max()) < 4.5


def test_a_diagonal_curvature_gives_the_diagonal_noise() -> None:
    diagonal = normal(4).exp()
    kfac = KFAC({}, {"norm": diagonal}, damping=1.0)
    like = {"norm": torch.zeros(4, dtype=torch.float64)}
    plain = DiagonalNoise.optimal({"norm": diagonal + RIDGE}, SCALE)
    noise = KroneckerNoise.optimal(kfac, RIDGE, SCALE)
    assert near(noise.draw(like, 1)["norm"], plain.draw(like, 1)["norm"], 1e-14)
    assert noise.information({"norm": diagonal}) == pytest.approx(plain.information({"norm": diagonal}), rel=1e-13)


def test_an_intercept_has_curvature_one() -> None:
    kfac = KFAC({}, {"norm": torch.full((1,), 0.2, dtype=torch.float64)}, damping=1.0)
    like = {"norm": torch.zeros(1, dtype=torch.float64), "intercept": torch.zeros(3, dtype=torch.float64)}
    noise = KroneckerNoise.optimal(kfac, RIDGE, SCALE)
    expected = IsotropicNoise(math.sqrt(SCALE)).draw(like, 2)["intercept"]
    assert near(noise.draw(like, 2)["intercept"], expected, 1e-14)
    alone = {"norm": torch.zeros(1), "intercept": torch.tensor([0.0, 2.0, 0.0])}
    assert noise.information(alone) == pytest.approx(2 / SCALE) == noise.worst_information(2.0)


def test_every_rank_of_any_number_draws_the_same() -> None:
    net = build_net("residual")
    like = random_direction(net)
    images = normal(6, 3, 8, 8, seed=1)

    def draw() -> Tensor:
        rank, world = torch.distributed.get_rank(), torch.distributed.get_world_size()
        kfac = fit_kfac(net, None, [images[rank::world]], damping=1.0, reducer=current_reducer())
        return flat(KroneckerNoise.optimal(kfac, RIDGE, SCALE).draw(like, 4), list(like))

    (alone,), pair, three = (run_on_ranks(world, draw) for world in (1, 2, 3))
    for drawn in [*pair, *three]:
        # Sums of the factors over ranks round differently, and eigenvectors follow where eigenvalues are close.
        assert near(drawn, alone, 1e-9)
    assert torch.equal(pair[0], pair[1])
    assert torch.equal(three[0], three[2])


@pytest.mark.parametrize("odd", [{"ridge": 0.0}, {"scale": math.nan}, {"power": 0.0}, {"power": 2.0}])
def test_what_is_no_covariance_is_refused(odd: dict[str, float]) -> None:
    kfac = KFAC({}, {"norm": torch.ones(1)}, damping=1.0)
    with pytest.raises(ValueError, match=r"expected a positive ridge, a positive scale and a power of at most 1, got"):
        KroneckerNoise(kfac, **({"ridge": 1.0, "scale": 1.0} | odd))


def test_weights_without_those_of_the_factors_are_refused() -> None:
    noise = KroneckerNoise.optimal(KFAC({}, {"norm": torch.ones(1)}, damping=1.0), 1.0, 1.0)
    with pytest.raises(ValueError, match="first odd one is 'norm'"):
        noise.draw({"intercept": torch.zeros(1)}, 0)
