"""What every single sample contributed: the optimum without it, exactly, for all samples at once."""

from dataclasses import dataclass
from typing import Protocol, TypeVar

import torch
from torch import Tensor

from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.solution import Solution

Cross = TypeVar("Cross", contravariant=True)


@dataclass(frozen=True)
class RemovalGeometry:
    r"""What decides, for every sample, how the optimum moves without it; labels have no part in it.

    Let G be the inverse of the dual system, :math:`(A^{1/2} K A^{1/2} + \lambda I)^{-1}`, or the top left block of the
    bordered inverse if there is an intercept. A removal is driven by :math:`t_i = G_{ii}^{-1} \beta_i / \sqrt{a_i}`;
    all that follows is linear or quadratic in t. Every entry is (n, blocks, coupled, coupled), the C outputs being
    split into blocks, coupled outputs and columns as in a `Kernel`: (n, 1, C, C) for the full problem.

    Attributes:
        inverse: :math:`G_{ii}`; the leverage is :math:`h_i = I - \lambda G_{ii}`.
        weight: :math:`Q_i` with :math:`\lVert dw - dw_{-i} \rVert_M^2 = t_i^T Q_i t_i`; it is
            :math:`G_{ii} - \lambda (G^2)_{ii}`.
        border: :math:`E_i` with :math:`b - b_{-i} = E_i t_i`; zeros without an intercept.
        function: The same as `weight` for the squared change of the outputs, averaged over other samples; None if
            there are none.
    """

    inverse: Tensor
    weight: Tensor
    border: Tensor
    function: Tensor | None = None


class Removable(Protocol[Cross]):
    """A solved problem that knows its removals: `DualFactor`, or one in terms of features."""

    @property
    def problem(self) -> QuadraticProblem:
        """The problem that has been solved."""
        ...

    def solution(self) -> Solution:
        """The optimum on all samples, with coefficients."""
        ...

    def geometry(self, cross: Cross | None = None) -> RemovalGeometry:
        """What decides how removals move the optimum.

        Args:
            cross: Other samples for `RemovalGeometry.function`, in the form that the representation has.
        """
        ...


@dataclass(frozen=True)
class LeaveOneOut:
    r"""The problem without sample i, for every i; row i of every entry belongs to it.

    Removing a sample removes its data term and its linear term; the ridge stays, and the intercept is fitted anew.
    Samples of weight 0 are absent already: their residual is the ordinary one and nothing changes without them.

    Attributes:
        residual: :math:`e_i = y_i - f_{-i}(x_i)` (n, C).
        prediction: :math:`f_{-i}(x_i)` (n, C), which does not depend on y_i.
        leverage: :math:`h_i = I - \lambda G_{ii}` (n, blocks, coupled, coupled), intercept included.
        weight_change: :math:`\lVert dw - dw_{-i} \rVert_M^2` (n,), summed over outputs that have weights of their own.
        intercept_change: :math:`b - b_{-i}` (n, C).
        cook: Change of (dw, b) in the norm of the Hessian of the objective (n,): :math:`a_i e_i^T h_i e_i` (for
            l = 0), Cook's distance without its factor.
        function_change: :math:`\lVert f(x) - f_{-i}(x) \rVert^2` (n,), averaged over the other samples x; None if
            none were given.
        geometry: What the change of a label leaves as it is.
    """

    residual: Tensor
    prediction: Tensor
    leverage: Tensor
    weight_change: Tensor
    intercept_change: Tensor
    cook: Tensor
    function_change: Tensor | None
    geometry: RemovalGeometry


def leave_one_out(factor: Removable[Cross], cross: Cross | None = None) -> LeaveOneOut:
    r"""Remove every sample in turn, without solving anything again.

    Deleting a block of the dual system gives :math:`\beta - \beta_{-i} = A^{1/2} G_{:i} t_i`, with
    :math:`t_i = G_{ii}^{-1} \beta_i / \sqrt{a_i}` and :math:`e_i = t_i / \sqrt{a_i} + l_i / a_i`. For a_i = 1 and
    l = 0 this is :math:`e_i = (I - h_i)^{-1} (y_i - f_i)`. Influence functions stop at :math:`y_i - f_i`; the factor
    that LQF (arXiv 2012.11140) prints in equation 8 shrinks where it must amplify.

    Args:
        factor: The solved problem.
        cross: Other samples, whose outputs are watched: for `DualFactor` a `Kernel` with their rows and the training
            samples' columns. Their labels are not needed.

    Returns:
        See there. Refusals are those of `held_out_residual`.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.dual import DualFactor
        >>> from lqf_lightning.linear.kernel import Kernel
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), ridge=1.0)
        >>> result = leave_one_out(DualFactor(problem, Kernel({"all": torch.ones(1, 2, 2)}, outputs=1)))
        >>> [round(float(value), 9) for value in result.prediction]  # the ridge fit to the other sample, y / 2
        [1.5, 0.5]
    """
    problem, geometry = factor.problem, factor.geometry(cross)
    residual = held_out_residual(problem, factor.solution(), geometry.inverse)
    return _collect(problem, geometry, residual, problem.target.double() - residual)


def held_out_residual(problem: QuadraticProblem, solution: Solution, inverse: Tensor) -> Tensor:
    r"""The leave-one-out residuals alone, :math:`e_i = a_i^{-1} G_{ii}^{-1} \beta_i + l_i / a_i`.

    Args:
        problem: What has been solved.
        solution: Its optimum.
        inverse: The blocks :math:`G_{ii}` (n, blocks, coupled, coupled), as in `RemovalGeometry`.

    Returns:
        Residuals (n, C).

    Raises:
        ValueError: The solution has no coefficients.
    """
    if solution.coefficients is None:
        raise ValueError("leave-one-out needs a solution with coefficients")
    refuse_undefined_removals(problem)
    root, present, shift = _scales(problem)
    sides = torch.where(present, solution.coefficients / root, 0.0).reshape(*inverse.shape[:3], -1)
    driving = torch.linalg.solve(inverse, sides).reshape(root.shape[0], -1)
    return torch.where(present, driving / root + shift, problem.target.double() - solution.outputs)


def refuse_undefined_removals(problem: QuadraticProblem) -> None:
    """Refuse problems of which a sample cannot be removed.

    Args:
        problem: What has been solved.

    Raises:
        ValueError: A sample of weight 0 has a linear term, or an intercept would be left without samples.
    """
    absent = problem.root_weight[:, 0] == 0
    if bool(problem.linear_terms[absent].any()):
        raise ValueError(
            f"{int(problem.linear_terms[absent].any(1).sum())} samples of weight 0 have linear terms: removing them is "
            "not supported. Give them a small positive weight or no linear term"
        )
    if problem.intercept and int((~absent).sum()) < 2:
        raise ValueError("without its only sample an intercept cannot be fitted: leave-one-out needs 2 of them")


def relabel(result: LeaveOneOut, problem: QuadraticProblem, target: Tensor) -> LeaveOneOut:
    r"""What the leave-one-out result of sample i would be with another label y_i, the other labels as they are.

    The prediction of the model that has not seen the sample stays, so :math:`e_i' = y_i' - f_{-i}(x_i)`; everything
    else follows from it at a cost independent of the number of samples.

    Args:
        result: The result for the labels of `problem`.
        problem: The problem that it belongs to.
        target: New targets (n, C); row i answers the question for sample i alone.

    Returns:
        The result with new residuals and changes.

    Raises:
        ValueError: The targets have another shape.
    """
    if target.shape != problem.target.shape:
        raise ValueError(f"expected targets {tuple(problem.target.shape)}, got {tuple(target.shape)}")
    residual = result.residual + (target.double() - problem.target.double())
    return _collect(problem, result.geometry, residual, result.prediction)


def _collect(problem: QuadraticProblem, geometry: RemovalGeometry, residual: Tensor, prediction: Tensor) -> LeaveOneOut:
    root, present, shift = _scales(problem)
    blocks, coupled = geometry.inverse.shape[1:3]
    driving = torch.where(present, root * (residual - shift), 0.0)
    sides = driving.reshape(problem.samples, blocks, coupled, -1)
    leverage = torch.eye(coupled).to(residual) - problem.ridge * geometry.inverse
    return LeaveOneOut(
        residual=residual,
        prediction=prediction,
        leverage=leverage,
        weight_change=_quadratic(geometry.weight, sides),
        intercept_change=(geometry.border @ sides).reshape(residual.shape),
        cook=_quadratic(leverage, sides),
        function_change=None if geometry.function is None else _quadratic(geometry.function, sides),
        geometry=geometry,
    )


def _quadratic(form: Tensor, sides: Tensor) -> Tensor:
    # Rounding may leave a form that should vanish slightly negative, never the change that it measures.
    return (sides * (form @ sides)).sum((1, 2, 3)).clamp_min(0.0)


def _scales(problem: QuadraticProblem) -> tuple[Tensor, Tensor, Tensor]:
    # A linear term acts as a shift of the target by l / a, as long as there is a data term.
    present = problem.root_weight > 0
    root = torch.where(present, problem.root_weight, 1.0)
    return root, present, torch.where(present, problem.linear_terms / root.square(), 0.0)
