"""The eigenvectors of a kernel, with which every ridge and every training time costs one product."""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.dual_system import INDEFINITE, DualSystem
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem

_COPIES = 5  # the kernel, the matrix to decompose, its eigenvectors, and two of workspace


class KernelSpectrum:
    r"""One eigendecomposition of :math:`P A^{1/2} K A^{1/2} P = U \mathrm{diag}(\kappa) U^T`.

    With an intercept, P projects on the complement of :math:`B = A^{1/2} (1 \otimes I)`, and U spans that complement
    alone; otherwise P = I. A linear term acts as the target :math:`y - l / a`. Hence, with
    :math:`r = A^{1/2} (y - l / a - f_0)`,

    * the optimum for any ridge is :math:`\gamma = U (\kappa + \lambda)^{-1} U^T r`, and the top left block G of the
      bordered inverse is :math:`U (\kappa + \lambda)^{-1} U^T`;
    * gradient descent that keeps the intercept at its optimum stands at :math:`U \varphi_t(\kappa + \lambda) U^T r`.

    Args:
        problem: What is minimized; its ridge plays no part in the decomposition.
        kernel: Inner products among the training samples.
        scales: Inverse penalty weights by layer group, see `Kernel.total`.
        budget: Bytes that the matrices may take; the default is enough for N = 17,000.

    Attributes:
        system: Problem and kernel.
        values: kappa (b, K) ascending, not negative; K = N, less the coupled outputs if there is an intercept.
        vectors: U (b, N, K).
        sides: r (b, N, s).
        projected: `U^T r` (b, K, s).

    Raises:
        ValueError: Kernel and problem do not fit together, the matrices exceed the budget, the kernel has negative
            eigenvalues, or a sample of weight 0 has a linear term.
    """

    def __init__(
        self,
        problem: QuadraticProblem,
        kernel: Kernel,
        scales: Mapping[str, float] | None = None,
        *,
        budget: int = 12 * 2**30,
    ) -> None:
        self.system = DualSystem(problem, kernel, scales, copies=_COPIES, budget=budget)
        absent = problem.root_weight == 0
        if bool((problem.linear_terms != 0).logical_and(absent).any()):
            raise ValueError(
                "a sample of weight 0 has a linear term, which no target expresses: give it a small positive weight"
            )
        matrix, dropped = self._projected_matrix()
        values, vectors = torch.linalg.eigh(matrix)
        self.values, self.vectors = values[:, dropped:], vectors[:, :, dropped:]
        low, top = float(self.values.min()), float(self.values.max())
        if low < -INDEFINITE * top:
            raise ValueError(
                f"the kernel has the eigenvalue {low:.3g}, its largest is {top:.3g}: no kernel of Jacobians has. "
                "Assemble it without TF32, with the same samples and sketch for rows and columns"
            )
        rounding = torch.finfo(torch.float64).eps * len(self.system.root) * top
        self.values = torch.where(self.values > rounding, self.values, 0.0)
        shift = torch.where(absent, 0.0, problem.linear_terms / problem.root_weight.square().clamp_min(1e-300))
        self.sides = self.system.root * kernel.split(problem.residual - shift)
        self.projected = self.vectors.mT @ self.sides

    def _projected_matrix(self) -> tuple[Tensor, int]:
        matrix = self.system.weighted()
        if not self.system.problem.intercept:
            return matrix, 0
        # A large negative eigenvalue sets the directions of the intercept apart from all others, null ones included.
        columns = self.system.columns / self.system.columns.norm(dim=0)
        across = matrix @ columns
        level = matrix.flatten(1).norm(dim=1).clamp_min(torch.finfo(torch.float64).tiny)[:, None, None]
        half = across - 0.5 * columns @ (columns.T @ across) + 0.5 * level * columns
        wide = columns.expand_as(half)
        return matrix.baddbmm_(half, wide.mT, alpha=-1).baddbmm_(wide, half.mT, alpha=-1), columns.shape[1]

    def dual(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        r"""The dual variable :math:`\gamma = U \varphi(\kappa) U^T r`, for a function of the eigenvalues.

        Args:
            function: phi, elementwise; :math:`1 / (\kappa + \lambda)` gives the optimum.

        Returns:
            gamma (b, N, s).
        """
        result: Tensor = self.vectors @ (function(self.values).unsqueeze(2) * self.projected)
        return result

    def coefficients(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        r"""The coefficients :math:`\beta = A^{1/2} \gamma` of `dual`.

        Args:
            function: phi, see there.

        Returns:
            beta (n, C).
        """
        return self.system.kernel.join(self.system.root * self.dual(function))

    def own_blocks(self, function: Callable[[Tensor], Tensor]) -> Tensor:
        r"""Diagonal blocks of :math:`U \varphi(\kappa) U^T`, one by sample.

        Args:
            function: phi, elementwise; :math:`1 / (\kappa + \lambda)` gives those of G.

        Returns:
            Blocks (n, blocks, coupled, coupled), as in `RemovalGeometry`.
        """
        rows = self.vectors.reshape(len(self.vectors), self.system.problem.samples, self.system.kernel.coupled, -1)
        blocks: Tensor = (rows * function(self.values)[:, None, None]) @ rows.mT
        return blocks.transpose(0, 1)
