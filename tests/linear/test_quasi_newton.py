import itertools
import math

import pytest
import torch
from torch import Tensor

from lqf_lightning.linear.quasi_newton import QuasiNewton


def run(search: QuasiNewton, function, most: int = 200) -> list[Tensor]:
    points = []
    for _ in range(most):
        point = search.point.clone().requires_grad_()
        value = function(point)
        (slope,) = torch.autograd.grad(value, point, allow_unused=True)
        value = value.detach()
        points.append(search.point.clone())
        if not search.tell(float(value), slope):
            break
    return points


def valley(point: Tensor) -> Tensor:
    return 1 - torch.exp(-0.05 * (point[0] - 1) ** 2 - 0.2 * (point[1] - point[0] ** 2 / 4) ** 2)


def test_curved_valleys_are_followed_to_the_minimum():
    points = run(QuasiNewton(torch.tensor([-2.0, 2.0], dtype=torch.float64), tolerance=1e-10), valley)
    assert len(points) <= 40
    assert min(float(valley(point)) for point in points) < 1e-8


def test_quadratics_of_different_curvatures_need_few_evaluations():
    curvatures = torch.logspace(-2, 1, 6, dtype=torch.float64)

    def bowl(point: Tensor) -> Tensor:
        return (curvatures * (point - torch.arange(6.0)) ** 2).sum()

    points = run(QuasiNewton(torch.zeros(6, dtype=torch.float64), tolerance=1e-6, longest=10.0), bowl)
    assert float(bowl(points[-1])) < 1e-4
    assert len(points) <= 25


def test_numbers_stay_within_reach_of_the_center():
    center = torch.tensor([1.0, 0.0], dtype=torch.float64)
    points = run(QuasiNewton(center + 1, center=center, tolerance=1e-9, reach=3.0), lambda p: p[0] + (p[1] - 1) ** 2)
    assert all(float((point - center).abs().max()) <= 3 for point in points)
    assert points[-1][0] == -2
    assert abs(float(points[-1][1]) - 1) < 1e-3


def test_steps_are_limited_and_undefined_places_turned_back_from():
    def wall(point: Tensor) -> Tensor:
        return torch.where(point > 2.5, math.inf, -point).sum()

    points = run(QuasiNewton(torch.zeros(1, dtype=torch.float64), tolerance=1e-3), wall)
    moves = [abs(float(b - a)) for a, b in itertools.pairwise(points)]
    assert max(moves) <= 2
    assert float(points[1]) == 1
    assert 2.3 < max(float(p) for p in points if float(p) <= 2.5) <= 2.5


def test_flat_functions_end_at_once_and_undefined_starts_are_refused():
    search = QuasiNewton(torch.zeros(2, dtype=torch.float64), tolerance=1e-3)
    assert not search.tell(1.0, torch.zeros(2, dtype=torch.float64))
    with pytest.raises(ValueError, match="finite value to start from, got inf"):
        QuasiNewton(torch.zeros(2), tolerance=1e-3).tell(math.inf, torch.zeros(2))
