"""Conjugate gradients in weight space, one step at a time, whoever runs the passes over the data."""

import math
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.metric import Metric, Tensors, dot
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.solution import Certificate, Solution

Precondition = Callable[[Tensors], Tensors]


class ConjugateGradient:
    r"""The state of preconditioned conjugate gradients on a `QuadraticProblem`.

    A step is two sweeps over the data, which together read it once forward in time and once backward: `J p` of the
    search direction, and `J^T r` of the residual that follows from it. So every step ends with the *true* gradient, not
    a recurrence, and its certificate holds up to the rounding of the images `J dw`, which add up from step to step.
    The intercept is at its optimum after every step (derivatives by the outputs sum to zero), which also takes the
    common mean of all Jacobians, the largest eigenvalue by far, out of the problem.

        descent = ConjugateGradient(problem, zeros)
        descent.receive_gradient(J^T descent.residual)
        while descent.certificate.relative_gradient > 1e-3:
            descent.receive_image(J descent.direction)
            descent.receive_gradient(J^T descent.residual)

    Exact line search with the Polak-Ribiere rule (Nocedal & Wright, Numerical Optimization, 5.2), which forgives
    rounding and approximate preconditioners. In exact arithmetic and with the identity for a preconditioner these are
    the iterates of linear conjugate gradients.

    Args:
        problem: The problem, with the samples of all ranks.
        start: Movement dw to start from, by parameter name; the intercept's parameter must not be among them. Zeros
            of the right shapes, or with `image`, any movement.
        metric: M; None for the identity.
        precondition: Approximates the inverse of `J^T A J + lam M`, up to a factor; None takes `M^-1`.
        image: `J dw` (n, C) of the start; None if it is zero.
        reference: Gradient norm at `dw = 0`, which certificates are relative to; it depends on no ridge, so that of
            another descent from zero serves. None takes the norm at the start.

    Attributes:
        problem: As given.
        movement: dw by parameter name; a step makes new tensors, so that those of earlier steps stay as they are.
        image: `J dw` (n, C), double precision.
        direction: Search direction by parameter name, ready when a gradient has been received.
        steps: Steps taken.
        length: How far the last one went along its direction.
        reference: Gradient norm that certificates are relative to; not a number before the first gradient.

    Raises:
        ValueError: The start is not zero, and its image is missing.
    """

    def __init__(
        self,
        problem: QuadraticProblem,
        start: Mapping[str, Tensor],
        *,
        metric: Metric | None = None,
        precondition: Precondition | None = None,
        image: Tensor | None = None,
        reference: float | None = None,
    ) -> None:
        self.problem, self.metric = problem, metric or Metric()
        self.precondition = precondition or self.metric.solve
        self.movement: Tensors = {name: entry.detach().clone() for name, entry in start.items()}
        if image is None and any(bool(entry.any()) for entry in self.movement.values()):
            raise ValueError("the start is not zero, so its image `J dw` must be given; `StreamedJacobian.push` has it")
        self.image = torch.zeros_like(problem.residual) if image is None else image.to(problem.residual)
        self.direction: Tensors = {}
        self.gradient: Tensors = {}
        self.steps, self.length = 0, 0.0
        self._slope = 0.0  # g . P g of the last gradient
        self.reference = math.nan if reference is None else reference
        self._measured = False  # whether the gradient is that of the present movement
        self._weight = problem.root_weight.square()

    @property
    def intercept(self) -> Tensor:
        """The intercept b (C,), optimal for the present movement."""
        if not self.problem.intercept:
            return torch.zeros(self.problem.outputs, dtype=torch.float64, device=self.image.device)
        wanted = self._weight * (self.problem.residual - self.image) - self.problem.linear_terms
        return wanted.sum(0) / self._weight.sum()

    @property
    def outputs(self) -> Tensor:
        """Predictions on the samples, `f_0 + J dw + b` (n, C)."""
        return self.problem.initial.double() + self.image + self.intercept

    @property
    def residual(self) -> Tensor:
        """Derivative of the data term with respect to the outputs (n, C), the right-hand side of `J^T`."""
        return self._weight * (self.outputs - self.problem.target.double()) + self.problem.linear_terms

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """Right-hand sides of `J^T` in the next sweep."""
        return (self.residual,)

    def receive_sides(self, *pulled: Tensors) -> None:
        """Take in `J^T` of the sides, and choose the next direction.

        Args:
            *pulled: The products, summed over all samples, by parameter name. Other names are ignored.
        """
        old = self.gradient
        self._update_gradient(pulled[0])
        step = self.precondition(self.gradient)
        self._turn(step, dot(self.gradient, step), dot(old, step) if old else 0.0)

    def receive_gradient(self, pulled: Tensors) -> None:
        """Take in `J^T residual`, and choose the next direction; for descents with that side only.

        Args:
            pulled: The product, summed over all samples, by parameter name. Other names are ignored.
        """
        self.receive_sides(pulled)

    def _update_gradient(self, pulled: Tensors) -> None:
        penalty = self.metric.multiply(self.movement)
        self.gradient = {n: pulled[n] + self.problem.ridge * entry for n, entry in penalty.items()}
        if not math.isfinite(dot(self.gradient, self.gradient)):
            raise FloatingPointError("the gradient is not finite: check the images and the pre-trained weights")
        if math.isnan(self.reference):
            self.reference = self._gradient_norm()
        self._measured = True

    def _turn(self, step: Tensors, slope: float, overlap: float) -> float:
        # Products of the step with the present and the last gradient, in whichever space they are to be conjugate.
        if not math.isfinite(slope):
            raise FloatingPointError("the preconditioned gradient is not finite: check the preconditioner")
        again = max(0.0, (slope - overlap) / self._slope) if self.direction and self._slope else 0.0
        last = self.direction
        self.direction = {n: again * last[n] - entry if again else -entry for n, entry in step.items()}
        self._slope = slope
        return again

    def receive_image(self, rows: Tensor) -> None:
        """Take in `J direction`, and move to the minimum along it.

        Args:
            rows: The product (n, C) for all samples.
        """
        rows = rows.to(self.image)
        varied = rows
        if self.problem.intercept:
            varied = rows - (self._weight * rows).sum(0) / self._weight.sum()
        self.length = length = self._best_length(varied)
        self.movement = {n: torch.add(entry, self.direction[n], alpha=length) for n, entry in self.movement.items()}
        self.image = torch.add(self.image, rows, alpha=length)
        self.steps, self._measured = self.steps + 1, False

    def renew_image(self, rows: Tensor) -> None:
        """Take in `J movement`, computed anew; the gradient has to be received again.

        Args:
            rows: The product (n, C) for all samples, free of what the images of the steps have rounded.
        """
        self.image, self._measured = rows.to(self.image), False

    def _best_length(self, varied: Tensor) -> float:
        curvature = float((self._weight * varied.square()).sum())
        curvature += self.problem.ridge * self.metric.squared_norm(self.direction)
        return -dot(self.gradient, self.direction) / curvature if curvature > 0 else 0.0

    @property
    def objective(self) -> float:
        """Value of the objective at the present movement."""
        error = self.outputs - self.problem.target.double()
        moved = self.image + self.intercept
        data = 0.5 * (self._weight * error.square()).sum() + (self.problem.linear_terms * moved).sum()
        return float(data) + 0.5 * self.problem.ridge * self.metric.squared_norm(self.movement)

    @property
    def certificate(self) -> Certificate:
        """How far the movement is from the optimum.

        Raises:
            RuntimeError: The gradient of the present movement has not been received yet.
        """
        if not self._measured:
            raise RuntimeError("no gradient has been received since the last step: call `receive_gradient` before")
        norm = self._gradient_norm()
        relative = norm / self.reference if self.reference > 0 else (math.inf if norm > 0 else 0.0)
        return Certificate(relative, norm / self.problem.ridge, self.objective)

    def solution(self) -> Solution:
        """The present point as a `Solution`.

        Returns:
            The solution with its certificate; its dual coefficients are those of the residual, `-residual / lam`, and
            reproduce the movement as far as it is converged.
        """
        coefficients = -self.residual / self.problem.ridge
        return Solution(coefficients, self.intercept, self.outputs, self.certificate, dict(self.movement))

    def state(self) -> dict[str, Tensors | float]:
        """What is needed to go on after an interruption; `restore` takes it back.

        Returns:
            Tensors and numbers.
        """
        rest = {"steps": float(self.steps), "slope": self._slope, "reference": self.reference}
        tensors = {"movement": self.movement, "direction": self.direction, "gradient": self.gradient}
        return {**tensors, **rest, "measured": float(self._measured)}

    def restore(self, state: Mapping[str, Tensors | float], image: Tensor) -> None:
        """Go on from a kept state.

        Args:
            state: From `state`.
            image: `J movement` (n, C).
        """
        kept: dict[str, object] = dict(state)
        for name in ("movement", "direction", "gradient"):
            tensors = kept[name]
            if isinstance(tensors, Mapping):
                setattr(self, name, dict(tensors))
        self.image = image.to(self.image)
        self.steps, self._measured = int(float(str(kept["steps"]))), bool(float(str(kept["measured"])))
        self._slope, self.reference = float(str(kept["slope"])), float(str(kept["reference"]))

    def _gradient_norm(self) -> float:
        return math.sqrt(max(0.0, dot(self.gradient, self.metric.solve(self.gradient))))
