"""Conjugate gradients in the coefficients of the samples, where an approximate kernel is a preconditioner."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.conjugate_gradient import ConjugateGradient
from lqf_lightning.linear.metric import Metric, Tensors
from lqf_lightning.linear.problem import QuadraticProblem


class CoefficientDescent(ConjugateGradient):
    r"""The state of preconditioned conjugate gradients on the dual of a `QuadraticProblem`.

    Movements are :math:`dw = M^{-1} J^T A^{1/2} \gamma`, and what is left of the dual system
    :math:`S \gamma + A^{1/2} 1 b = A^{1/2} (y - f_0)`, with :math:`S = A^{1/2} K A^{1/2} + \lambda I`, is minus the
    *misfit* :math:`d = A^{1/2} (f - y) + \lambda \gamma`. The gradient by the weights is :math:`J^T A^{1/2} d`. A step
    needs :math:`M^{-1} J^T A^{1/2} \tilde S^{-1} d` beside it, a second right-hand side in the same sweep (8 units of
    work instead of 6), and steps are few: their number depends on :math:`\tilde S^{-1} S` alone.

    Directions are conjugate and lengths the best in the norm of S, in which :math:`\tilde S^{-1}` is symmetric. In the
    weights it is not (:math:`\tilde S` and K do not commute), and directions made conjugate there come to a standstill
    when the ridge is small. So the error in that norm falls with every step, :math:`\lVert dw - dw^* \rVert_M^2
    + \lambda \lVert \gamma - \gamma^* \rVert^2`, while the objective may rise for a step or two. Misfit, gradient
    and certificate are computed from the present outputs, not by recurrence.

    Args:
        problem: The problem, with the samples of all ranks and without linear terms.
        start: Zeros of the right shapes by parameter name; the intercept's parameter must not be among them.
        approximate_inverse: Applies a symmetric :math:`\tilde S^{-1}` to rows (n, C), see `DualPrecondition`; with an
            intercept, what it gives is orthogonal to :math:`A^{1/2} 1`.
        metric: M; None for the identity.

    Attributes:
        coefficients: gamma (n, C) of the movement.
        change: gamma of the direction.

    Raises:
        ValueError: The problem has linear terms.
    """

    def __init__(
        self,
        problem: QuadraticProblem,
        start: Mapping[str, Tensor],
        approximate_inverse: Callable[[Tensor], Tensor],
        *,
        metric: Metric | None = None,
    ) -> None:
        if problem.linear is not None:
            raise ValueError("linear terms have no dual preconditioner here: precondition in weight space instead")
        super().__init__(problem, start, metric=metric)
        self.approximate_inverse = approximate_inverse
        self.coefficients = torch.zeros_like(self.image)
        self.change = torch.zeros_like(self.image)
        self._misfit = torch.zeros_like(self.image)  # when the last direction was chosen
        self._step = torch.zeros_like(self.image)

    @property
    def misfit(self) -> Tensor:
        """What is left of the dual system (n, C), zero at the optimum."""
        error = self.outputs - self.problem.target.double()
        return self.problem.root_weight * error + self.problem.ridge * self.coefficients

    @property
    def sides(self) -> tuple[Tensor, ...]:
        """Right-hand sides of `J^T` in the next sweep: the residual, and the preconditioned step."""
        self._step = self.approximate_inverse(self.misfit)
        return self.residual, self.problem.root_weight * self._step

    def receive_sides(self, *pulled: Tensors) -> None:
        """Take in `J^T` of the sides, and choose the next direction.

        Args:
            *pulled: The products, summed over all samples, by parameter name.
        """
        residual, step = pulled
        self._update_gradient(residual)
        last, self._misfit = self._misfit, self.misfit
        moving = self.metric.solve({name: step[name] for name in self.movement})
        again = self._turn(moving, float((self._misfit * self._step).sum()), float((last * self._step).sum()))
        self.change = again * self.change - self._step

    def receive_image(self, rows: Tensor) -> None:
        """Take in `J direction`, and move to the minimum of the dual along it.

        Args:
            rows: The product (n, C) for all samples.
        """
        super().receive_image(rows)
        self.coefficients = torch.add(self.coefficients, self.change, alpha=self.length)

    def _best_length(self, varied: Tensor) -> float:
        image = self.problem.root_weight * varied + self.problem.ridge * self.change
        curvature = float((self.change * image).sum())
        return -float((self._misfit * self.change).sum()) / curvature if curvature > 0 else 0.0

    def state(self) -> dict[str, Tensors | float]:
        """What is needed to go on after an interruption; `restore` takes it back.

        Returns:
            Tensors and numbers.
        """
        dual = {"coefficients": self.coefficients, "change": self.change, "misfit": self._misfit}
        return {**super().state(), "dual": dual}

    def restore(self, state: Mapping[str, Tensors | float], image: Tensor) -> None:
        """Go on from a kept state.

        Args:
            state: From `state`.
            image: `J movement` (n, C).

        Raises:
            ValueError: It is the state of another kind of descent.
        """
        dual = state.get("dual")
        if not isinstance(dual, Mapping):
            raise ValueError("the kept state has no coefficients: it is of conjugate gradients without a sketch")
        super().restore(state, image)
        names = ("coefficients", "change", "misfit")
        self.coefficients, self.change, self._misfit = (dual[name].to(self.image) for name in names)
