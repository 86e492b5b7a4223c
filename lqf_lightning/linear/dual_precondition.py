"""A preconditioner that acts on coefficients, from any kernel that resembles the exact one."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem


class DualPrecondition:
    r"""Applies :math:`(A^{1/2} \tilde K A^{1/2} + \lambda I)^{-1}` for a kernel :math:`\tilde K` near the exact one.

    With the intercept, whose multiplier is eliminated exactly, the result is orthogonal to :math:`A^{1/2} 1`.

    Args:
        problem: The problem that is solved.
        kernel: Stands for the exact kernel: that of a sketch (`of_rows`), a trace kernel, ...
        scales: Inverse penalty weights by layer group, see `Kernel.total`.
    """

    def __init__(self, problem: QuadraticProblem, kernel: Kernel, scales: Mapping[str, float] | None = None) -> None:
        self.kernel, self.factor = kernel, DualFactor(problem, kernel, scales)

    @classmethod
    @full_precision()
    def of_rows(cls, problem: QuadraticProblem, rows: Tensor) -> "DualPrecondition":
        """Take the inner products of sketched rows for the kernel.

        Args:
            problem: The problem that is solved.
            rows: Sketches (n, C, D) from `sketch_rows`.

        Returns:
            The preconditioner.
        """
        flat = rows.flatten(0, 1)
        matrix = torch.empty(len(flat), len(flat), dtype=flat.dtype, device=flat.device)
        torch.mm(flat, flat.T, out=matrix)
        # Rounding leaves eigenvalues slightly below zero, which a ridge has to outweigh; it need not be the problem's.
        least = 4 * torch.finfo(flat.dtype).eps * float(matrix.diagonal().double().sum())
        steady = problem.with_(ridge=max(problem.ridge, least))
        return cls(steady, Kernel({"sketch": matrix.unsqueeze(0)}, rows.shape[1]))

    def __call__(self, residual: Tensor) -> Tensor:
        """Apply the inverse.

        Args:
            residual: Of the dual system (n, C).

        Returns:
            A step of the dual coefficients (n, C).
        """
        return self.kernel.join(self.factor.solve(self.kernel.split(residual))[0])
