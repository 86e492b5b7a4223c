import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear.dense_ridge import flat, near, normal
from linear.nets import build_net, random_direction
from lqf_lightning.linear import KFAC, fit_kfac
from lqf_lightning.linear.metric import KroneckerMetric, Metric, dot

EXACT = 1e-10  # relative, float64: eigenvectors lose a few digits against plain products


def curvature(kfac: KFAC, shapes: dict[str, torch.Size]) -> Tensor:
    """The model of the mean-form curvature as one matrix, from its factors by Kronecker products."""
    start = 0
    offsets = {name: (start, start := start + shape.numel()) for name, shape in shapes.items()}
    dense = torch.zeros(start, start, dtype=torch.float64)
    for layer in kfac.factors.values():
        width = layer.inputs.shape[-1]
        block = torch.block_diag(*[torch.kron(g, a) for a, g in zip(layer.inputs, layer.outputs, strict=True)])
        bias = torch.arange(len(block)) % width == width - 1 if layer.bias else torch.zeros(len(block)).bool()
        rows = torch.empty(len(block), dtype=torch.long)
        if layer.weight:
            rows[~bias] = torch.arange(*offsets[layer.weight])
        if layer.bias:
            rows[bias] = torch.arange(*offsets[layer.bias])
        dense[rows[:, None], rows] = block
    for name, diagonal in kfac.diagonals.items():
        rows = torch.arange(*offsets[name])
        dense[rows, rows] = diagonal.flatten()
    return dense


@pytest.fixture(params=["residual", "depthwise"])
def fitted(request: pytest.FixtureRequest, x: Tensor) -> tuple[nn.Module, KFAC, Tensor]:
    net = build_net(request.param)
    kfac = fit_kfac(net, None, [x], damping=1.0)
    return net, kfac, curvature(kfac, {name: p.shape for name, p in net.named_parameters()})


def test_the_plain_metric_is_the_identity() -> None:
    direction = {"a": normal(2, 3), "b": normal(4)}
    assert all(torch.equal(Metric().multiply(direction)[name], entry) for name, entry in direction.items())
    assert all(torch.equal(Metric().solve(direction)[name], entry) for name, entry in direction.items())
    assert Metric().squared_norm(direction) == pytest.approx(float(flat(direction).square().sum()), rel=1e-14)


def test_weights_scale_their_tensors_and_leave_the_others() -> None:
    metric, direction = Metric({"a": 4.0, "absent": 9.0}), {"a": normal(2, 3), "b": normal(4)}
    assert torch.equal(metric.multiply(direction)["a"], 4 * direction["a"])
    assert torch.equal(metric.solve(direction)["a"], direction["a"] / 4)
    assert torch.equal(metric.multiply(direction)["b"], direction["b"])
    expected = 4 * direction["a"].square().sum() + direction["b"].square().sum()
    assert metric.squared_norm(direction) == pytest.approx(float(expected), rel=1e-14)


@pytest.mark.parametrize("weight", [0.0, -1.0, math.nan, math.inf])
def test_a_weight_that_is_no_penalty_is_refused(weight: float) -> None:
    with pytest.raises(ValueError, match=r"must be positive and finite, got \{'a': .*leave a tensor out"):
        Metric({"a": weight, "b": 1.0})


@pytest.mark.parametrize("damping", [0.0, -1.0, math.nan])
def test_a_curvature_metric_needs_damping(damping: float) -> None:
    with pytest.raises(ValueError, match="damping of a curvature metric must be positive"):
        KroneckerMetric(fit_kfac(nn.Linear(2, 1).double(), None, [normal(3, 2)], damping=1.0), damping)


def test_a_curvature_metric_is_the_damped_curvature(fitted: Any) -> None:
    net, kfac, dense = fitted
    direction, metric = random_direction(net), KroneckerMetric(kfac, 0.3)
    expected = dense @ flat(direction) + 0.3 * flat(direction)
    assert near(flat(metric.multiply(direction), list(direction)), expected, EXACT)
    assert metric.squared_norm(direction) == pytest.approx(float(flat(direction) @ expected), rel=EXACT)
    assert near(flat(metric.solve(metric.multiply(direction)), list(direction)), flat(direction), EXACT)


def test_group_weights_damp_their_layers_in_the_curvature_solver(fitted: Any) -> None:
    net, kfac, dense = fitted
    gradient = random_direction(net)
    metric = Metric({name: 5.0 for name in gradient if name.startswith("0.")})
    solved = metric.curvature_solver(kfac, samples=7, ridge=0.4, damping_factor=2.0)(gradient)
    penalty = torch.cat([torch.full((g.numel(),), metric.weights.get(n, 1.0)) for n, g in gradient.items()]).double()
    expected = torch.linalg.solve(7 * dense + 0.8 * penalty.diag(), flat(gradient))
    assert near(flat(solved, list(gradient)), expected, EXACT)


def test_the_curvature_solver_of_a_curvature_metric_inverts_data_and_penalty(fitted: Any) -> None:
    net, kfac, dense = fitted
    gradient, eye = random_direction(net), torch.eye(len(dense), dtype=torch.float64)
    solved = KroneckerMetric(kfac, 0.3).curvature_solver(kfac, samples=7, ridge=0.4, damping_factor=2.0)(gradient)
    expected = torch.linalg.solve(7 * dense + 0.8 * (dense + 0.3 * eye), flat(gradient))
    assert near(flat(solved, list(gradient)), expected, EXACT)


def test_inner_products_are_summed_in_double_precision() -> None:
    first = {"a": torch.tensor([1e8, 1.0]), "b": torch.tensor([-1e8])}
    second = {"b": torch.ones(1), "a": torch.ones(2)}
    assert dot(first, second) == 1.0
    assert dot({}, {}) == 0.0
