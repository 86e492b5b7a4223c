"""The steps of stochastic gradient descent, as far as they do not depend on the data."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TrainingRule:
    r"""What `torch.optim.SGD` does with a gradient g of the mean loss, step by step.

    .. math:: v_t = \mu v_{t-1} + g_t, \qquad dw_{t+1} = dw_t - h_t d_t,

    with :math:`v_0 = g_0`, and :math:`d_t = v_t`, or :math:`d_t = g_t + \mu v_t` with Nesterov's momentum. Weight decay
    is part of the gradient, see `TrainingGroup`.

    Attributes:
        rates: Learning rates h (T,), one per step: a schedule, written out.
        momentum: mu, at least 0 and below 1.
        nesterov: Whether the momentum is Nesterov's.

    Raises:
        ValueError: A rate is negative or not finite, there is none, the momentum is out of range, or Nesterov's has
            none.

    Example:
        >>> import torch
        >>> TrainingRule(torch.tensor([0.25, 0.25, 0.5]), momentum=0.5).time
        2.0
    """

    rates: Tensor
    momentum: float = 0.0
    nesterov: bool = False

    def __post_init__(self) -> None:
        if self.rates.dim() != 1 or not len(self.rates):
            raise ValueError(f"expected one learning rate per step (T,), got {tuple(self.rates.shape)}")
        if not bool((torch.isfinite(self.rates) & (self.rates >= 0)).all()):
            raise ValueError(f"learning rates must be finite and not negative, got {self.rates.tolist()[:5]}")
        if not 0 <= self.momentum < 1 or (self.nesterov and self.momentum == 0):
            raise ValueError(
                f"the momentum must be at least 0 and below 1, above 0 for Nesterov's; got {self.momentum} with "
                f"nesterov={self.nesterov}. Set method.optimizer.momentum=0.9"
            )

    @property
    def steps(self) -> int:
        """Number of steps T."""
        return len(self.rates)

    @property
    def time(self) -> float:
        r"""How far the slowest modes come, :math:`\sum_t h_t / (1 - \mu)`: only these see an effective rate."""
        return float(self.rates.double().sum()) / (1 - self.momentum)

    def longest_rate(self, curvature: float) -> float:
        r"""The learning rate at which a quadratic of this curvature no longer converges.

        :math:`h x < 2 (1 + \mu)`, or :math:`h x < 2 (1 + \mu) / (1 + 2 \mu)` with Nesterov's momentum, where the
        curvature x is the largest eigenvalue of the kernel over n, plus the weight decay.

        Args:
            curvature: x, positive.

        Returns:
            The bound of h.

        Example:
            >>> import torch
            >>> TrainingRule(torch.ones(1), momentum=0.9).longest_rate(2.0)
            1.9
        """
        return 2 * (1 + self.momentum) / (1 + 2 * self.momentum * self.nesterov) / curvature

    def refuse_divergence(self, curvature: float) -> None:
        """Refuse full-batch steps that are too long.

        Args:
            curvature: See `longest_rate`.

        Raises:
            ValueError: A learning rate of the schedule is not below the bound.
        """
        highest = float(self.rates.max())
        if curvature > 0 and not highest < self.longest_rate(curvature):
            raise ValueError(
                f"training on all samples diverges: the learning rate reaches {highest:.4g}, the curvature is "
                f"{curvature:.4g}, and with momentum {self.momentum:g} rates must be below "
                f"{self.longest_rate(curvature):.4g}. Set method.optimizer.lr={0.5 * self.longest_rate(curvature):.2g}"
            )
