import pytest
import torch

from linear.problems import SCALES, make_toy
from lqf_lightning.analysis.intercept_certificate import mean_jacobian_by_pulls, mean_jacobian_of_kernel
from lqf_lightning.linear import DualFactor, Metric

WEIGHTS = [1.0, 0.0, 2.0, 0.5, 3.0, 0.0, 1.5, 1.0, 0.2]


@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_both_ways_give_the_norm_of_the_weighted_mean_jacobian(weights):
    toy = make_toy(weights=weights, intercept=True)
    rows = toy.features[0]  # (n, C, P), the metric taken in
    share = torch.tensor(weights or [1.0] * 9, dtype=torch.float64)
    mean = torch.einsum("i,icp->cp", share / share.sum(), rows)
    norm = float(torch.linalg.matrix_norm(mean, 2))
    matrix = DualFactor(toy.problem, toy.kernel, SCALES).system.matrix[0]
    assert mean_jacobian_of_kernel(toy.problem, matrix) == pytest.approx(norm, rel=1e-12)
    plain = rows / torch.tensor([4.0, 1.0], dtype=torch.float64).sqrt().repeat_interleave(torch.tensor([30, 4]))
    scaled = Metric({"body": 0.25, "head": 1.0})  # so that features are J M^-1/2

    def pull(*sides):
        products = [torch.einsum("icp,ic->p", plain, side) for side in sides]
        return [{"body": product[:30], "head": product[30:]} for product in products]

    assert mean_jacobian_by_pulls(toy.problem, scaled, pull) == pytest.approx(norm, rel=1e-12)


def test_the_norm_bounds_how_the_best_intercept_moves_and_is_reached():
    toy = make_toy(intercept=True, weights=WEIGHTS)
    rows, weight = toy.features[0], torch.tensor(WEIGHTS, dtype=torch.float64)
    norm = mean_jacobian_of_kernel(toy.problem, DualFactor(toy.problem, toy.kernel, SCALES).system.matrix[0])

    def best(movement):
        return (weight[:, None] * (toy.problem.residual - rows @ movement)).sum(0) / weight.sum()

    draws = torch.randn(50, 34, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    moved = torch.stack([(best(draw) - best(torch.zeros_like(draw))).norm() / draw.norm() for draw in draws])
    assert float(moved.max()) <= norm
    mean = torch.einsum("i,icp->cp", weight / weight.sum(), rows)
    worst = torch.linalg.svd(mean).Vh[0]
    assert float((best(worst) - best(torch.zeros_like(worst))).norm()) == pytest.approx(norm, rel=1e-10)
