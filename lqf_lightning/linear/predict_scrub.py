"""How many steps conjugate gradients will take to forget some samples, counted on the kernel alone."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.dual_system import DualSystem
from lqf_lightning.linear.problem import QuadraticProblem

_SWEEP, _REFERENCE, _STEP = 3.0, 2.0, 5.0  # units of work per sample: `J p` or `J^T r`, one more r, a training step


@dataclass(frozen=True)
class ScrubForecast:
    """What a Newton scrub by conjugate gradients will do, step by step.

    Attributes:
        relative_gradient: Norm of the gradient before the first step and after each one (steps + 1), that of the
            combination of points where it is least, relative to the norm at `dw = 0` on the samples that stay.
        distance_bound: Upper bound of the distance from the retrained optimum in the norm of the metric (steps + 1).
        reached: Whether the tolerance is reached.
    """

    relative_gradient: tuple[float, ...]
    distance_bound: tuple[float, ...]
    reached: bool

    @property
    def steps(self) -> int:
        """Steps that are taken."""
        return len(self.relative_gradient) - 1

    @property
    def sweeps(self) -> int:
        """Sweeps over the samples that stay: outputs and gradient at the start, in every step, and at the end anew."""
        return 2 * (self.steps + 1 + min(1, self.steps))

    @property
    def passes(self) -> float:
        """Work in units of an epoch of training on the samples that stay.

        A sweep takes 3 evaluations of the network per sample, that of the start 2 more for the gradient at `dw = 0`, a
        step of training 5.
        """
        return (self.sweeps * _SWEEP + _REFERENCE) / _STEP


def predict_scrub(
    system: DualSystem, problem: QuadraticProblem, start: Tensor, *, tolerance: float, max_steps: int = 1000
) -> ScrubForecast:
    r"""Run conjugate gradients of weight space in the coefficients of the samples: no network is evaluated.

    From :math:`dw = M^{-1} J^T \alpha` every iterate of `ConjugateGradient` without a preconditioner has this form.
    With the derivatives r of the data term by the outputs, the gradient in the metric is :math:`M^{-1} J^T (r +
    \lambda \alpha)`, and all inner products are those of the kernel, so the steps are the same ones up to rounding, and
    so is the combination of least gradient that a scrub ends with (`LeastGradient`). A step costs one product with the
    kernel. A scrub with a preconditioner takes other steps, as a rule fewer.

    Args:
        system: A kernel of all samples; its own problem plays no part.
        problem: What is minimized: samples to be forgotten have weight 0, and the ridge is that of the others.
        start: Coefficients alpha (n, C) of the weights to start from, those of forgotten samples included.
        tolerance: Relative gradient at which the scrub stops.
        max_steps: Steps after which the forecast gives up.

    Returns:
        The course of the scrub.

    Raises:
        ValueError: The tolerance is not positive, or the start has another shape than the problem.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.kernel import Kernel
        >>> both = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), ridge=1.0)
        >>> kernel = Kernel({"all": torch.ones(1, 2, 2)}, outputs=1)
        >>> system = DualSystem(both, kernel, None, copies=1, budget=2**20)
        >>> kept = both.with_(weight=torch.tensor([1.0, 0.0]), ridge=0.5)
        >>> forecast = predict_scrub(system, kept, torch.tensor([[-1 / 3], [5 / 3]]), tolerance=1e-6)
        >>> forecast.steps, forecast.passes  # one weight: one step
        (1, 4.0)
    """
    if not 0 < tolerance < math.inf:
        raise ValueError(f"the tolerance must be positive and finite, got {tolerance}")
    if start.shape != problem.initial.shape:
        raise ValueError(f"expected coefficients {tuple(problem.initial.shape)}, got {tuple(start.shape)}")
    descent = _Descent(system, problem, start)
    relative, bound = [descent.relative], [descent.norm / problem.ridge]
    while relative[-1] > tolerance and len(relative) <= max_steps:
        descent.step()
        relative.append(descent.relative)
        bound.append(descent.norm / problem.ridge)
    return ScrubForecast(tuple(relative), tuple(bound), relative[-1] <= tolerance)


class _Descent:
    # Polak-Ribiere with exact line search, as `ConjugateGradient` has it; g and p stand for J^T g and J^T p.
    def __init__(self, system: DualSystem, problem: QuadraticProblem, start: Tensor) -> None:
        self.system, self.problem = system, problem
        self.weight = problem.root_weight.square()
        self.residual, self.linear = problem.residual, problem.linear_terms
        zero = torch.zeros_like(self.residual)
        self.reference = _length(side := self._side(zero, zero), self._times(side))
        self.coefficients, self.image = start.double(), self._times(start.double())
        self.gradient = self._side(self.coefficients, self.image)
        self.pulled = self._times(self.gradient)
        self.direction, self.pushed = -self.gradient, -self.pulled
        self.least, self.least_pulled = self.gradient, self.pulled  # as `LeastGradient` combines them

    @property
    def norm(self) -> float:
        return _length(self.least, self.least_pulled)

    @property
    def relative(self) -> float:
        return self.norm / self.reference if self.reference > 0 else (math.inf if self.norm > 0 else 0.0)

    def step(self) -> None:
        varied, ridge = self._centered(self.pushed), self.problem.ridge
        curvature = (self.weight * varied.square()).sum() + ridge * (self.direction * self.pushed).sum()
        length = -(self.gradient * self.pushed).sum() / curvature if curvature > 0 else 0.0
        self.coefficients = self.coefficients + length * self.direction
        self.image = self.image + length * self.pushed
        old, slope = self.gradient, (self.gradient * self.pulled).sum()
        self.gradient = self._side(self.coefficients, self.image)
        self.pulled = self._times(self.gradient)
        change = ((self.gradient - old) * self.pulled).sum()
        again = float((change / slope).clamp_min(0.0)) if slope > 0 else 0.0
        self.direction = again * self.direction - self.gradient
        self.pushed = again * self.pushed - self.pulled
        self._combine()

    def _combine(self) -> None:
        apart, moved = self.least - self.gradient, self.least_pulled - self.pulled
        square = float((apart * moved).sum())
        share = float((self.least * moved).sum()) / square if square > 0 else 1.0
        self.least, self.least_pulled = self.least - share * apart, self.least_pulled - share * moved

    def _side(self, coefficients: Tensor, image: Tensor) -> Tensor:
        error = image - self.residual
        if self.problem.intercept:
            error = error - (self.weight * error + self.linear).sum(0) / self.weight.sum()
        return self.weight * error + self.linear + self.problem.ridge * coefficients

    def _centered(self, rows: Tensor) -> Tensor:
        if not self.problem.intercept:
            return rows
        return rows - (self.weight * rows).sum(0) / self.weight.sum()

    def _times(self, rows: Tensor) -> Tensor:
        kernel = self.system.kernel
        return kernel.join(self.system.matrix @ kernel.split(rows))


def _length(side: Tensor, image: Tensor) -> float:
    return float((side * image).sum().clamp_min(0.0).sqrt())
