"""The metric M of the penalty `lam/2 dw^T M dw`, as an operator on movements of the weights."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.kfac import KFAC

Tensors = dict[str, Tensor]


class Metric:
    """A diagonal metric, one weight per parameter tensor; the identity by default.

    Args:
        weights: Positive weight by parameter name; names that are absent have weight 1. A larger weight keeps a
            tensor nearer to its pre-trained values.

    Raises:
        ValueError: A weight is not positive and finite. To freeze a tensor, do not linearize it.

    Example:
        >>> import torch
        >>> Metric({"weight": 2.0}).squared_norm({"weight": torch.tensor([1.0, 2.0]), "bias": torch.tensor([3.0])})
        19.0
    """

    def __init__(self, weights: Mapping[str, float] | None = None) -> None:
        self.weights = dict(weights or {})
        odd = {name: weight for name, weight in self.weights.items() if not 0 < weight < math.inf}
        if odd:
            raise ValueError(
                f"penalty weights must be positive and finite, got {odd}; leave a tensor out of `parameters` instead"
            )

    def multiply(self, direction: Tensors) -> Tensors:
        """Apply M.

        Args:
            direction: Movement by parameter name.

        Returns:
            `M v` by parameter name.
        """
        return {name: entry * self.weights.get(name, 1.0) for name, entry in direction.items()}

    def solve(self, direction: Tensors) -> Tensors:
        """Apply the inverse of M.

        Args:
            direction: Gradient by parameter name.

        Returns:
            `M^-1 v` by parameter name.
        """
        return {name: entry / self.weights.get(name, 1.0) for name, entry in direction.items()}

    def squared_norm(self, direction: Tensors) -> float:
        """The square of a movement's length in this metric.

        Args:
            direction: Movement by parameter name.

        Returns:
            `v^T M v`.
        """
        return dot(direction, self.multiply(direction))

    def curvature_solver(
        self, kfac: KFAC, samples: int, ridge: float, damping_factor: float = 1.0
    ) -> "CurvatureSolver":
        """An approximate inverse of the Hessian `J^T J + lam M`, for preconditioning.

        Args:
            kfac: Kronecker factors of the mean-form Gauss-Newton matrix.
            samples: Number of samples n.
            ridge: lam.
            damping_factor: What lam is multiplied with.

        Returns:
            An operator on gradients.
        """
        damping = {name: damping_factor * ridge * self.weights.get(name, 1.0) for name in kfac.names}
        return CurvatureSolver(kfac, float(samples), damping)


class KroneckerMetric(Metric):
    """The curvature itself as the metric, `M = H + damping I` with Kronecker factors for H.

    A movement then costs what it changes the outputs by, which is the penalty that early-stopped K-FAC descent implies.

    Args:
        kfac: Kronecker factors of the mean-form Gauss-Newton matrix.
        damping: Positive, keeps the metric definite.

    Raises:
        ValueError: The damping is not positive.
    """

    def __init__(self, kfac: KFAC, damping: float) -> None:
        super().__init__()
        if not damping > 0:
            raise ValueError(f"the damping of a curvature metric must be positive, got {damping}")
        self.kfac, self.damping = kfac, damping

    def multiply(self, direction: Tensors) -> Tensors:
        """Apply M.

        Args:
            direction: Movement by parameter name.

        Returns:
            `M v` by parameter name.
        """
        return self.kfac.multiply(direction, damping=self.damping)

    def solve(self, direction: Tensors) -> Tensors:
        """Apply the inverse of M.

        Args:
            direction: Gradient by parameter name.

        Returns:
            `M^-1 v` by parameter name.
        """
        return self.kfac.solve(direction, scale=1.0, damping=self.damping)

    def curvature_solver(
        self, kfac: KFAC, samples: int, ridge: float, damping_factor: float = 1.0
    ) -> "CurvatureSolver":
        """An approximate inverse of the Hessian `J^T J + lam M`, for preconditioning.

        Args:
            kfac: The factors that the metric is made of.
            samples: Number of samples n.
            ridge: lam.
            damping_factor: What lam is multiplied with.

        Returns:
            An operator on gradients.
        """
        penalty = damping_factor * ridge
        return CurvatureSolver(kfac, samples + penalty, dict.fromkeys(kfac.names, penalty * self.damping))


class CurvatureSolver:
    """Applies `(s H + D)^-1` with Kronecker factors for H.

    Args:
        kfac: The factors.
        scale: s.
        damping: D by parameter name.
    """

    def __init__(self, kfac: KFAC, scale: float, damping: dict[str, float]) -> None:
        self.kfac, self.scale, self.damping = kfac, scale, damping

    def __call__(self, gradient: Tensors) -> Tensors:
        """Precondition a gradient.

        Args:
            gradient: Gradient by parameter name.

        Returns:
            Direction by parameter name.
        """
        return self.kfac.solve(gradient, scale=self.scale, damping=self.damping)


def dot(first: Tensors, second: Tensors) -> float:
    """The inner product of two movements, summed in double precision.

    Args:
        first: Entries by parameter name.
        second: Entries of the same names.

    Returns:
        Their inner product.
    """
    products = [torch.sum(entry.double() * second[name].double()) for name, entry in first.items()]
    return float(torch.stack(products).sum()) if products else 0.0
