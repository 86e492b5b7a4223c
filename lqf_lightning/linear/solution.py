"""What a solver returns: the optimum and the proof of how near it is."""

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Certificate:
    r"""How far a point is from the optimum, from quantities that the solver has computed, not estimated.

    The objective is :math:`\lambda`-strongly convex in the metric M, so with the gradient g at the point (the intercept
    at its optimum) :math:`\lVert dw - dw^* \rVert_M \le \lVert g \rVert_{M^{-1}} / \lambda`.

    Attributes:
        relative_gradient: `|g|` over its value at `dw = 0`, in the norm of the inverse metric.
        distance_bound: Upper bound of `|dw - dw*|` in the norm of the metric, the unit of the weights for M = I.
        objective: Value of the sum-form objective, penalty included.
    """

    relative_gradient: float
    distance_bound: float
    objective: float


@dataclass(frozen=True)
class Solution:
    r"""The optimum of a `QuadraticProblem`, or a certified neighbor of it.

    At the optimum the movement of the weights is :math:`dw = M^{-1} J^T \beta`; `coefficients` are these beta, which a
    kernel turns into predictions, and `direction` is dw itself, where the representation knows the weights. Solvers in
    weight space give the beta of their residuals, :math:`\beta = -(A (f - y) + l) / \lambda`, which reproduce an
    unconverged dw up to :math:`M^{-1} g / \lambda`: a distance of exactly `distance_bound` in the norm of the metric.

    Attributes:
        coefficients: beta (n, C); None if the solver has no dual form.
        intercept: b (C,), zeros if the problem has none.
        outputs: Predictions on the training samples, `f_0 + J dw + b` (n, C).
        certificate: See there.
        direction: dw by parameter name, the intercept not included; None where only a kernel is known.
    """

    coefficients: Tensor | None
    intercept: Tensor
    outputs: Tensor
    certificate: Certificate
    direction: Mapping[str, Tensor] | None = None
