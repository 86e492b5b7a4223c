"""How leave-one-out error, fit and movement depend on the ridge: all ridges from one decomposition."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lqf_lightning.linear.dual_system import WORST_CONDITION
from lqf_lightning.linear.held_out import held_out_accuracy, held_out_cross_entropy, held_out_press
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.leave_one_out import held_out_residual
from lqf_lightning.linear.solution import Solution

Criterion = Literal["accuracy", "press", "cross_entropy"]


@dataclass(frozen=True)
class RegularizationPath:
    r"""What every ridge would give; entry r of every tensor belongs to ridge r.

    Samples of weight 0 have no part in sums and means, others the part that their weight says.

    Attributes:
        ridges: lambda (R,).
        residual: Leave-one-out residuals :math:`y_i - f_{-i}(x_i)` (R, n, C).
        press: Weighted sum of their squares (R,).
        accuracy: Of leave-one-out predictions (R,); None for a single output.
        cross_entropy: Of leave-one-out predictions at their best temperature, in nats (R,); None for a single output.
        gcv: Generalized cross-validation, the mean squared training residual over (1 - degrees / number)^2 (R,).
        degrees_of_freedom: Sum of the leverages, intercept included (R,).
        weight_norm: `|dw|` in the norm of the metric (R,).
        training_error: Weighted sum of squared training residuals (R,).
        validation_accuracy: On other samples (R,); None if none were given.
    """

    ridges: Tensor
    residual: Tensor
    press: Tensor
    accuracy: Tensor | None
    cross_entropy: Tensor | None
    gcv: Tensor
    degrees_of_freedom: Tensor
    weight_norm: Tensor
    training_error: Tensor
    validation_accuracy: Tensor | None = None

    def choose(self, by: Criterion = "accuracy") -> float:
        """The ridge that held-out predictions prefer.

        Args:
            by: "accuracy", with ties broken by the squared residuals; "press"; or "cross_entropy".

        Returns:
            The ridge.

        Raises:
            ValueError: The criterion is unknown or needs more than one output.
        """
        values = {"accuracy": self.accuracy, "press": -self.press, "cross_entropy": self.cross_entropy}
        if by not in values:
            raise ValueError(f"got {by!r}, expected one of {list(values)}")
        score = values[by]
        if score is None:
            raise ValueError(f"{by!r} is not defined for a single output; choose by 'press'")
        score = -score if by == "cross_entropy" else score
        tied = torch.where(score >= score.max() - 1e-12, self.press, torch.inf)
        return float(self.ridges[tied.argmin() if by == "accuracy" else score.argmax()])


def default_ridges(spectrum: KernelSpectrum, number: int = 16) -> Tensor:
    """Ridges on a logarithmic grid between 1e-4 and 10 times the mean diagonal of the weighted kernel.

    Args:
        spectrum: The decomposed kernel.
        number: How many.

    Returns:
        Ridges (number,), ascending.

    Raises:
        ValueError: The kernel vanishes.
    """
    scale = float(spectrum.values.mean())
    if scale == 0:
        raise ValueError("the kernel is zero: the outputs do not depend on the linearized parameters")
    return scale * torch.logspace(-4, 1, number, dtype=torch.float64)


def regularization_path(
    spectrum: KernelSpectrum,
    ridges: Sequence[float] | None = None,
    *,
    cross: Kernel | None = None,
    initial: Tensor | None = None,
    target: Tensor | None = None,
    watch: Callable[[Sequence[float]], Iterable[float]] = iter,
) -> RegularizationPath:
    r"""Evaluate ridges by exact leave-one-out, at the cost of one product each.

    With U and :math:`\kappa` of the spectrum, :math:`G_{ii} = U_i \mathrm{diag}(1 / (\kappa + \lambda)) U_i^T` and
    :math:`e_i = (a_i^{1/2} G_{ii})^{-1} (U (\kappa + \lambda)^{-1} U^T r)_i + l_i / a_i`.

    Args:
        spectrum: The decomposed kernel of the problem, whose own ridge plays no part.
        ridges: lambdas, positive; None means `default_ridges`.
        cross: Kernel with the rows of other samples and the columns of the training samples, to validate on.
        initial: Outputs on the other samples before training (m, C); with `cross`.
        target: Their targets (m, C), largest at the right class; with `cross`.
        watch: Wraps the ridges, to report progress.

    Returns:
        The path.

    Raises:
        ValueError: A ridge is not positive or too small for double precision, or parts of the validation set are
            missing.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.problem import QuadraticProblem
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), ridge=1.0)
        >>> spectrum = KernelSpectrum(problem, Kernel({"all": torch.ones(1, 2, 2)}, outputs=1))
        >>> path = regularization_path(spectrum, [0.5, 1.0])  # predictions from the other sample: y / (1 + ridge)
        >>> [round(float(value), 9) for value in path.press], path.choose(by="press")
        ([6.444444444, 6.5], 0.5)
    """
    grid = _checked(spectrum, ridges)
    if len({cross is None, initial is None, target is None}) > 1:
        raise ValueError("validation needs `cross`, `initial` and `target` together")
    problem = spectrum.system.problem
    points, scores = [], []
    for ridge in watch(grid):
        solution = spectrum.system.certify(spectrum.coefficients(_inverse(ridge)), ridge)
        points.append(_evaluate(spectrum, ridge, solution))
        if cross is not None and initial is not None:
            scores.append(spectrum.system.predict(solution, cross, initial))
    residual, degrees, lengths, errors = (torch.stack(column) for column in zip(*points, strict=True))
    judged = (problem.target.double() - residual, problem.target, problem.weight)
    number = problem.outputs * (problem.root_weight > 0).sum()
    several = problem.outputs > 1
    return RegularizationPath(
        ridges=residual.new_tensor(grid),
        residual=residual,
        press=held_out_press(*judged),
        accuracy=held_out_accuracy(*judged) if several else None,
        cross_entropy=held_out_cross_entropy(*judged)[0] if several else None,
        gcv=errors / number / (1 - degrees / number).square(),
        degrees_of_freedom=degrees,
        weight_norm=lengths,
        training_error=errors,
        validation_accuracy=None if target is None else held_out_accuracy(torch.stack(scores), target),
    )


def _checked(spectrum: KernelSpectrum, ridges: Sequence[float] | None) -> list[float]:
    grid = default_ridges(spectrum).tolist() if ridges is None else [float(ridge) for ridge in ridges]
    least = 1.1 * float(spectrum.values.max()) / WORST_CONDITION
    if len(grid) == 0 or not all(least <= ridge < math.inf and ridge > 0 for ridge in grid):
        raise ValueError(f"ridges must be positive, finite and at least {least:.2g} for this kernel; got {grid}")
    return grid


def _inverse(ridge: float) -> Callable[[Tensor], Tensor]:
    return lambda values: 1 / (values + ridge)


def _evaluate(spectrum: KernelSpectrum, ridge: float, solution: Solution) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    problem, values = spectrum.system.problem, spectrum.values
    residual = held_out_residual(problem, solution, spectrum.own_blocks(_inverse(ridge)))
    degrees = spectrum.system.replicas * (values / (values + ridge)).sum() + problem.intercept * problem.outputs
    squares = values.unsqueeze(2) * (spectrum.projected / (values + ridge).unsqueeze(2)).square()
    error = problem.root_weight.square() * (problem.target.double() - solution.outputs).square()
    return residual, degrees, squares.sum().sqrt(), error.sum()
