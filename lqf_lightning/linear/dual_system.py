"""The linear-quadratic problem in terms of its kernel: the matrices, and the proof that a point is near the optimum."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.solution import Certificate, Solution

INDEFINITE = 1e-6  # negative eigenvalues that rounding in single precision explains, relative to the largest
WORST_CONDITION = 1e12  # of a system that double precision solves to four digits


class DualSystem:
    r"""A problem and a kernel that fit together, in double precision.

    Movements of the weights are :math:`dw = M^{-1} J^T \beta`. With :math:`\beta = A^{1/2} \gamma - l / \lambda` the
    optimum solves :math:`S \gamma + B b = A^{1/2} (y - f_0 + K l / \lambda)` and, with an intercept,
    :math:`B^T \gamma = \sum_i l_i / \lambda`, where :math:`S = A^{1/2} K A^{1/2} + \lambda I` and
    :math:`B = A^{1/2} (1 \otimes I)`. Matrices come as b independent ones of N = n * coupled rows.

    Args:
        problem: What is minimized.
        kernel: Inner products among the training samples.
        scales: Inverse penalty weights by layer group, see `Kernel.total`.
        copies: Matrices of this size that the caller will hold at once.
        budget: Bytes that these may take.

    Attributes:
        problem: As given.
        kernel: As given.
        scales: As given.
        matrix: K (b, N, N), made symmetric.
        root: Square roots of the sample weights by row (N, 1).
        columns: B (N, coupled), whether or not the intercept is fitted.

    Raises:
        ValueError: Kernel and problem do not fit together, or the matrices exceed the budget.
    """

    def __init__(
        self,
        problem: QuadraticProblem,
        kernel: Kernel,
        scales: Mapping[str, float] | None,
        *,
        copies: int,
        budget: int,
    ) -> None:
        self.problem, self.kernel, self.scales = problem, kernel, scales
        rows = problem.samples * kernel.coupled
        shape = (kernel.blocks, rows, rows)
        odd = [tuple(group.shape) for group in kernel.groups.values() if group.shape != shape]
        if kernel.outputs != problem.outputs or odd:
            raise ValueError(
                f"a {kernel.form} kernel of {problem.samples} training samples with {problem.outputs} outputs has "
                f"matrices {shape}; got {kernel.outputs} outputs and {odd[:1] or shape}"
            )
        _refuse_memory(problem, kernel, copies * 8 * kernel.blocks * rows**2, budget)
        total = kernel.total(scales)
        self.matrix = total.add_(total.mT.clone()).mul_(0.5)
        self.root = problem.root_weight.repeat_interleave(kernel.coupled, 0).to(self.matrix)
        self.columns = self.root * torch.eye(kernel.coupled).to(self.matrix).repeat(problem.samples, 1)

    @property
    def replicas(self) -> int:
        """Outputs that each matrix serves, the columns of the kernel."""
        return self.kernel.outputs // (self.kernel.blocks * self.kernel.coupled)

    def weighted(self) -> Tensor:
        """Scale rows and columns by the weights.

        Returns:
            A new `A^1/2 K A^1/2` (b, N, N).
        """
        return (self.matrix * self.root).mul_(self.root.T)

    def cross_matrix(self, cross: Kernel) -> Tensor:
        """The total of a kernel of other samples, with the scales of this one.

        Args:
            cross: Kernel with the rows of the other samples and the columns of the training samples.

        Returns:
            Matrices (b, m * coupled, N).

        Raises:
            ValueError: Form, outputs or columns differ from those of the training kernel.
        """
        matrix = cross.total(self.scales)
        if (cross.form, cross.outputs, matrix.shape[-1]) != (self.kernel.form, self.kernel.outputs, len(self.root)):
            raise ValueError(
                f"expected a {self.kernel.form} kernel of {self.kernel.outputs} outputs with {len(self.root)} columns, "
                f"one by training sample and coupled output; got {cross.form}, {cross.outputs}, {matrix.shape[-1]}"
            )
        return matrix

    def predict(self, solution: Solution, cross: Kernel, initial: Tensor) -> Tensor:
        """Outputs on other samples, `f_0 + K beta + b`.

        Args:
            solution: A solution in terms of this kernel.
            cross: Kernel with the rows of the other samples and the columns of the training samples.
            initial: Outputs on the other samples before training (m, C).

        Returns:
            Predictions (m, C).

        Raises:
            ValueError: The solution has no coefficients, or the shapes do not fit.
        """
        if solution.coefficients is None:
            raise ValueError("a kernel predicts from coefficients, and this solution has none")
        moved = self.kernel.join(self.cross_matrix(cross) @ self.kernel.split(solution.coefficients))
        if initial.shape != moved.shape:
            raise ValueError(f"expected initial outputs {tuple(moved.shape)}, got {tuple(initial.shape)}")
        return initial.double() + moved + solution.intercept

    def certify(self, coefficients: Tensor, ridge: float | None = None) -> Solution:
        r"""Complete coefficients to a solution whose distance from the optimum is computed, not assumed.

        The intercept is set to its optimum for the movement given. With
        :math:`u = A (y - f) - l - \lambda \beta` the gradient is :math:`-J^T u`, hence
        :math:`\lVert g \rVert_{M^{-1}}^2 = u^T K u`.

        Args:
            coefficients: beta (n, C), of any movement.
            ridge: lambda of the optimum that is meant; None means that of the problem.

        Returns:
            Predictions, intercept, and the certificate.
        """
        problem, ridge = self.problem, self.problem.ridge if ridge is None else ridge
        weight, linear = problem.root_weight.square(), problem.linear_terms
        moved = self.kernel.join(self.matrix @ self.kernel.split(coefficients))
        intercept = self._best_intercept(problem.residual - moved)
        error = problem.residual - moved - intercept
        at_start = problem.residual - self._best_intercept(problem.residual)
        gradient = self.length(weight * error - linear - ridge * coefficients)
        start = self.length(weight * at_start - linear)
        penalty = 0.5 * ridge * self.length(coefficients) ** 2
        data = 0.5 * (weight * error.square()).sum() + (linear * (moved + intercept)).sum()
        relative = gradient / start if start > 0 else (math.inf if gradient > 0 else 0.0)
        proof = Certificate(relative, gradient / ridge, float(data) + penalty)
        return Solution(coefficients, intercept, problem.initial.double() + moved + intercept, proof)

    def length(self, coefficients: Tensor) -> float:
        r"""The length :math:`\sqrt{\beta^T K \beta} = \lVert dw \rVert_M` of the movement that coefficients describe.

        Args:
            coefficients: beta (n, C).

        Returns:
            The length, in the norm of the metric.
        """
        sides = self.kernel.split(coefficients)
        return float((sides * (self.matrix @ sides)).sum().clamp_min(0.0).sqrt())

    def _best_intercept(self, error: Tensor) -> Tensor:
        if not self.problem.intercept:
            return torch.zeros_like(error[0])
        weight = self.problem.root_weight.square()
        return (weight * error - self.problem.linear_terms).sum(0) / weight.sum()


def _refuse_memory(problem: QuadraticProblem, kernel: Kernel, needed: int, budget: int) -> None:
    if needed > budget:
        raise ValueError(
            f"a {kernel.form} kernel of {problem.samples} samples and {problem.outputs} outputs needs "
            f"{needed / 2**30:.1f} GiB in double precision, the budget is {budget / 2**30:.1f} GiB. Fewer samples, a "
            "kernel of form trace or last_layer, sketched features or conjugate gradients need less; or raise `budget`"
        )
