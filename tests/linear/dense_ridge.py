"""Quadratic problems in weight space as one dense matrix, weights and intercept together."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from linear.nets import dense_jacobian
from lqf_lightning.linear.metric import Metric
from lqf_lightning.linear.problem import QuadraticProblem


class DenseRidge:
    """A problem with a known Jacobian (n, C, P): gradients, values and the optimum by the normal equations."""

    def __init__(self, problem: QuadraticProblem, jacobian: Tensor, metric: Tensor | None = None) -> None:
        self.problem, self.size = problem, jacobian.shape[2]
        self.weight = torch.ones(problem.samples) if problem.weight is None else problem.weight
        self.linear = torch.zeros(problem.samples, problem.outputs) if problem.linear is None else problem.linear
        self.weight, self.linear = self.weight.double(), self.linear.double()
        self.metric = torch.eye(self.size, dtype=torch.float64) if metric is None else metric
        ones = torch.eye(problem.outputs, dtype=torch.float64).expand(problem.samples, -1, -1)
        self.rows = torch.cat([jacobian, ones], 2) if problem.intercept else jacobian
        self.hessian = torch.einsum("i,icp,icq->pq", self.weight, self.rows, self.rows)
        self.hessian[: self.size, : self.size] += problem.ridge * self.metric
        pull = self.weight[:, None] * (problem.target.double() - problem.initial.double()) - self.linear
        self.right = torch.einsum("icp,ic->p", self.rows, pull)

    def optimum(self) -> Tensor:
        """Movement (P,) and intercept together."""
        return torch.linalg.solve(self.hessian, self.right)

    def with_intercept(self, movement: Tensor) -> Tensor:
        """The movement, and the intercept that is best for it."""
        cut = self.size
        if not self.problem.intercept:
            return movement
        best = torch.linalg.solve(self.hessian[cut:, cut:], self.right[cut:] - self.hessian[cut:, :cut] @ movement)
        return torch.cat([movement, best])

    def gradient(self, movement: Tensor) -> Tensor:
        whole: Tensor = self.hessian @ self.with_intercept(movement) - self.right
        return whole[: self.size]

    def outputs(self, point: Tensor) -> Tensor:
        return self.problem.initial + self.rows @ point

    def objective(self, movement: Tensor) -> float:
        point = self.with_intercept(movement)
        error = self.outputs(point) - self.problem.target
        data = 0.5 * torch.einsum("i,ic,ic->", self.weight, error, error) + (self.linear * (self.rows @ point)).sum()
        return float(data + 0.5 * self.problem.ridge * movement @ self.metric @ movement)

    def length(self, movement: Tensor) -> float:
        """The norm of the metric."""
        return float((movement @ self.metric @ movement).sqrt())

    def gradient_length(self, movement: Tensor) -> float:
        """The norm of the gradient in the inverse metric."""
        gradient = self.gradient(movement)
        return float((gradient @ torch.linalg.solve(self.metric, gradient)).sqrt())


def flat(tensors: Mapping[str, Tensor], names: Sequence[str] | None = None) -> Tensor:
    return torch.cat([tensors[name].double().flatten() for name in names or tensors])


def network_jacobian(net: nn.Module, x: Tensor, names: Sequence[str]) -> Tensor:
    jacobian = dense_jacobian(net, x)
    return torch.cat([jacobian[name].flatten(2) for name in names], 2)


def metric_matrix(metric: Metric, shapes: Mapping[str, torch.Size]) -> Tensor:
    """The metric as a matrix, one unit movement at a time."""
    sizes = [shape.numel() for shape in shapes.values()]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = zip(shapes.items(), unit.split(sizes), strict=True)
        result = metric.multiply({name: part.view(shape) for (name, shape), part in parts})
        columns.append(flat(result, list(shapes)))
    return torch.stack(columns, 1)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def near(got: Tensor, want: Tensor, tolerance: float) -> bool:
    """Equal up to a fraction of the norm."""
    return got.shape == want.shape and float((got - want).norm()) <= tolerance * float(want.norm())
