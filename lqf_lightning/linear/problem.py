"""The linear-quadratic problem that every exact claim is about, in one normalization."""

import math
from dataclasses import dataclass, replace
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class QuadraticProblem:
    r"""What is minimized over the movement `dw` of the weights and, if asked for, an intercept `b`.

    .. math:: \frac12 \sum_i a_i \lVert f_{0,i} + J_i\,dw + b - y_i \rVert^2 + \sum_i l_i \cdot (J_i\,dw + b)
        + \frac{\lambda}{2} dw^T M\,dw

    The sum form, always: `ridge` is lambda, not the `mu` of a mean loss (`ridge_of_mean` converts). J and the metric M
    belong to a representation (a kernel, features, a streamed Jacobian), which is handed to a solver beside the
    problem. The intercept carries no penalty and is part of the problem, so that leave-one-out re-fits it.

    Attributes:
        initial: Outputs f_0 at the pre-trained weights (n, C).
        target: Targets y (n, C), any numbers.
        ridge: lambda, positive.
        weight: Sample weights a (n,), not negative; None means 1. Samples of weight 0 count as absent.
        linear: Linear terms l (n, C); None means 0.
        intercept: Whether b is fitted; otherwise it is 0.

    Raises:
        ValueError: Shapes differ, a number is not finite, a weight is negative, or the ridge is not positive.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), ridge=0.5)
        >>> problem.residual.tolist()
        [[1.0], [3.0]]
    """

    initial: Tensor
    target: Tensor
    ridge: float
    weight: Tensor | None = None
    linear: Tensor | None = None
    intercept: bool = False

    def __post_init__(self) -> None:
        shape = self.initial.shape
        if len(shape) != 2 or self.target.shape != shape or 0 in shape:
            raise ValueError(f"expected outputs and targets (n, C), got {tuple(shape)} and {tuple(self.target.shape)}")
        if not 0 < self.ridge < math.inf:
            raise ValueError(f"the ridge must be positive and finite, got {self.ridge}. Set method.ridge=1e-3")
        if self.linear is not None and self.linear.shape != shape:
            raise ValueError(f"linear terms are {tuple(self.linear.shape)}, expected {tuple(shape)}")
        if self.weight is not None and (self.weight.shape != shape[:1] or bool((self.weight < 0).any())):
            raise ValueError(f"sample weights must be ({shape[0]},) and not negative, got {tuple(self.weight.shape)}")
        for name in ("initial", "target", "weight", "linear"):
            value = getattr(self, name)
            if value is not None and not bool(torch.isfinite(value).all()):
                raise ValueError(f"`{name}` holds values that are not finite; check the images and the network")
        if self.intercept and self.weight is not None and not bool((self.weight > 0).any()):
            raise ValueError("an intercept needs at least one sample of positive weight")

    @property
    def samples(self) -> int:
        """Number of samples n."""
        return len(self.initial)

    @property
    def outputs(self) -> int:
        """Number of outputs C."""
        return self.initial.shape[1]

    @property
    def residual(self) -> Tensor:
        """What there is to explain, `y - f_0` (n, C), in double precision."""
        return self.target.double() - self.initial.double()

    @property
    def root_weight(self) -> Tensor:
        """Square roots of the sample weights (n, 1), in double precision."""
        if self.weight is None:
            return torch.ones(self.samples, 1, dtype=torch.float64, device=self.initial.device)
        return self.weight.double().sqrt().unsqueeze(1)

    @property
    def linear_terms(self) -> Tensor:
        """The linear terms (n, C), zeros where there are none, in double precision."""
        return torch.zeros_like(self.initial, dtype=torch.float64) if self.linear is None else self.linear.double()

    def with_(self, **changes: object) -> Self:
        """The same problem with some parts changed.

        Args:
            **changes: Attributes and their new values.

        Returns:
            A new problem.
        """
        return replace(self, **changes)  # type: ignore[arg-type]  # the constructor checks


def ridge_of_mean(mu: float, samples: int) -> float:
    r"""The ridge of the sum form that has the same minimizer as a mean loss with penalty `mu/2 |dw|^2`.

    The mean loss meant is :math:`\frac1{2n} \sum_i \lVert f_i - y_i \rVert^2 + \frac\mu2 \lVert dw \rVert^2`, which
    the methods train.

    Args:
        mu: Strength of the penalty beside the mean loss.
        samples: Number of samples n (their total weight, if they have any).

    Returns:
        lambda, `n mu`.

    Example:
        >>> ridge_of_mean(1e-3, 500)
        0.5
    """
    return mu * samples


def mean_of_ridge(ridge: float, samples: int) -> float:
    """The inverse of `ridge_of_mean`.

    Args:
        ridge: lambda of the sum form.
        samples: Number of samples n.

    Returns:
        mu of the mean form.

    Example:
        >>> mean_of_ridge(0.5, 500)
        0.001
    """
    return ridge / samples
