"""What learning a penalty minimizes: the held-out loss and what is known before data, by logarithms of the scales."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.held_out_gradient import (
    HeldOutCriterion,
    HeldOutGradient,
    IndefiniteKernelError,
    held_out_gradient,
)
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem

_SPREAD = 2.5  # nats by which weights of groups differ before data, one standard deviation


@dataclass(frozen=True)
class PenaltyStep:
    """One evaluation of a `PenaltyObjective`.

    Attributes:
        point: Where (d,).
        value: Nats per sample; infinite where the system is indefinite.
        gradient: There (d,), zeros where the value is infinite.
        result: What it consists in besides the prior; None where the value is infinite.
    """

    point: Tensor
    value: float
    gradient: Tensor
    result: HeldOutGradient | None

    @property
    def informative(self) -> bool:
        """Whether predictions beat guessing."""
        return self.result is not None and self.result.temperature < math.inf


class PenaltyObjective:
    r"""A function of :math:`\theta_g = \log(s_g d_g / \lambda)`, d_g the mean diagonal of group g (d,), float64.

    .. math:: L(\theta) + \frac{1}{2n} \sum_g (\delta_g / 2.5)^2, \qquad
        \delta_g = \theta_g - \log p_g - \frac1d \sum_h (\theta_h - \log p_h)

    with L the held-out cross-entropy or, for "press", :math:`\frac C2 \log` of the mean squared residual: both in nats
    per sample. The second term is a weak prior, that groups have the parts p of the trace that are expected, give or
    take a factor of 12. A common factor of scales and ridge has no part in it, so that the ridge is taken as 1.

    Args:
        problem: What is minimized by the weights.
        kernel: Inner products among the training samples by group.
        criterion: "cross_entropy" or "press", see `held_out_gradient`.
        judged: Samples whose held-out prediction counts (n,), bool.
        together: As in `held_out_gradient`.
        expected: Part p_g of the trace by group, positive, in any common unit; None: all alike.
        least_ridge: Smallest ridge, in terms of the mean diagonal of the kernel: points with a smaller one stand for
            the point of this ridge in the same proportions.

    Attributes:
        means: d_g by group; groups without a part in the outputs are left out.

    Raises:
        ValueError: The kernel is zero or not finite, or a group is expected to have no part.
    """

    def __init__(
        self,
        problem: QuadraticProblem,
        kernel: Kernel,
        criterion: HeldOutCriterion,
        judged: Tensor,
        together: Tensor | None,
        expected: Mapping[str, float] | None = None,
        least_ridge: float = 0.0,
    ) -> None:
        self.problem, self.kernel, self.criterion = problem.with_(ridge=1.0), kernel, criterion
        self.judged, self.together, self.samples = judged, together, int(judged.sum())
        means = {name: float(one.diagonal(dim1=1, dim2=2).double().mean()) for name, one in kernel.groups.items()}
        odd = [name for name, mean in means.items() if not 0 <= mean < math.inf]
        if odd or not any(means.values()):
            wrong = f"the kernel of group {odd[0]!r} is not finite or negative" if odd else "the kernel is zero"
            raise ValueError(f"{wrong}: there is no penalty to learn. Check the network and the layer groups")
        self.means = {name: mean for name, mean in means.items() if mean > 0}
        parts = [1.0 if expected is None else expected.get(name, 0.0) for name in self.means]
        if min(parts) <= 0:
            raise ValueError(f"expected a positive part of the trace for each of {list(self.means)}, got {expected}")
        self._least = least_ridge
        self._expected = (torch.tensor(parts, dtype=torch.float64) / sum(parts)).log()

    def before(self, ridge: float) -> Tensor:
        """The point at which all groups have the parts of the trace that are expected.

        Args:
            ridge: lambda, in terms of the mean diagonal of their sum.

        Returns:
            theta (d,).
        """
        return self._expected - math.log(ridge)

    def position(self, scales: Mapping[str, float], ridge: float) -> Tensor:
        """The point that scales and a ridge are.

        Args:
            scales: s_g for all groups.
            ridge: lambda.

        Returns:
            theta (d,).

        Raises:
            ValueError: A group has no positive scale.
        """
        lacking = [name for name in self.means if scales.get(name, 0.0) <= 0]
        if lacking:
            raise ValueError(f"the start has no positive scale for group {lacking[0]!r}; it has {list(scales)}")
        numbers = [scales[name] * mean / ridge for name, mean in self.means.items()]
        return torch.tensor(numbers, dtype=torch.float64).log()

    def __call__(self, point: Tensor) -> PenaltyStep:
        """Evaluate.

        Args:
            point: theta (d,).

        Returns:
            Value and gradient, and the point that they are of.
        """
        beyond = torch.logsumexp(point, 0) + math.log(self._least) if self._least else point.new_tensor(0.0)
        if beyond <= 0:
            return self._evaluate(point)
        step = self._evaluate(point - beyond)
        along = step.gradient - point.softmax(0) * step.gradient.sum()
        return PenaltyStep(step.point, step.value, along, step.result)

    def _evaluate(self, point: Tensor) -> PenaltyStep:
        scales = {
            name: math.exp(at) / mean for (name, mean), at in zip(self.means.items(), point.tolist(), strict=True)
        }
        try:
            result = held_out_gradient(
                self.problem,
                self.kernel,
                scales,
                criterion=self.criterion,
                judged=self.judged,
                together=self.together,
            )
        except IndefiniteKernelError:
            # Rounding of the assembly exceeds this ridge: a limit of the search, which turns back from it.
            return PenaltyStep(point, math.inf, torch.zeros_like(point), None)
        value, gradient = result.loss, point.new_tensor([result.by_scale[name] for name in self.means])
        if self.criterion == "press":
            value = max(value, torch.finfo(torch.float64).tiny)
            value, gradient = self.problem.outputs / 2 * math.log(value), self.problem.outputs / 2 / value * gradient
        apart = point - self._expected
        apart = (apart - apart.mean()) / _SPREAD
        value += float(apart.square().sum()) / (2 * self.samples)
        return PenaltyStep(point, value, gradient + apart / (_SPREAD * self.samples), result)
