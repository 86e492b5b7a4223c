"""The exact optimum from one Cholesky factorization of the kernel."""

from collections.abc import Mapping
from functools import cached_property

import torch
from torch import Tensor

from lqf_lightning.linear.dual_system import INDEFINITE, WORST_CONDITION, DualSystem
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import RemovalGeometry
from lqf_lightning.linear.problem import QuadraticProblem, mean_of_ridge
from lqf_lightning.linear.solution import Solution

_CHUNK = 2**23  # numbers in the columns that are looked at together, 64 MiB
_COPIES = 3  # the kernel, its factor, and either the matrix being factored or the inverse


class DualFactor:
    r"""One factorization, from which follow the optimum, predictions and everything about removed samples.

    The matrix :math:`S = A^{1/2} K A^{1/2} + \lambda I` of the `DualSystem` is factored in double precision. All forms
    of kernels are handled alike: b matrices of N = n * coupled rows, each with s right-hand sides.

    Args:
        problem: What is minimized.
        kernel: Inner products among the training samples.
        scales: Inverse penalty weights by layer group, see `Kernel.total`.
        budget: Bytes that the matrices may take; the default is enough for N = 23,000.

    Attributes:
        system: Problem and kernel, and the total of the latter.
        lower: Cholesky factor of S (b, N, N).

    Raises:
        ValueError: Kernel and problem do not fit together, the matrices exceed the budget, the ridge is too small for
            double precision, or the kernel has negative eigenvalues.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[4.0], [16.0]]), ridge=1.0)
        >>> factor = DualFactor(problem, Kernel({"all": torch.diag(torch.tensor([3.0, 15.0]))[None]}, outputs=1))
        >>> factor.solution().outputs.flatten().tolist()  # K (K + 1)^-1 y
        [3.0, 15.0]
        >>> factor.degrees_of_freedom
        1.6875
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
        self.lower = _factor(self.system.weighted(), problem.ridge, problem.samples)

    @property
    def problem(self) -> QuadraticProblem:
        """The problem that has been solved."""
        return self.system.problem

    @cached_property
    def _bordered(self) -> tuple[Tensor, Tensor]:
        """`S^-1 B` (b, N, c) and `B^T S^-1 B` (b, c, c)."""
        half = torch.cholesky_solve(self.system.columns.expand(len(self.lower), -1, -1), self.lower)
        return half, self.system.columns.T @ half

    @cached_property
    def border(self) -> Tensor:
        """What the intercept takes from a right-hand side of the dual system (b, c, N): zeros if there is none."""
        if not self.problem.intercept:
            return torch.zeros_like(self.system.columns.T).expand(len(self.lower), -1, -1)
        half, gram = self._bordered
        border: Tensor = torch.linalg.solve(gram, half.mT)
        return border

    @cached_property
    def inverse(self) -> Tensor:
        """G (b, N, N): the inverse of S, or with an intercept the top left block of the bordered inverse."""
        result: Tensor = torch.cholesky_inverse(self.lower)
        return result.baddbmm_(self._bordered[0], self.border, alpha=-1) if self.problem.intercept else result

    def solve(self, sides: Tensor, totals: Tensor | None = None) -> tuple[Tensor, Tensor]:
        r"""Solve :math:`S \gamma + B b = R`, :math:`B^T \gamma = q`, or without an intercept :math:`S \gamma = R`.

        Args:
            sides: R (b, N, s).
            totals: q (b, c, s); None means 0. Without an intercept it plays no part.

        Returns:
            gamma (b, N, s) and b (b, c, s), zeros without an intercept.
        """
        result, intercept = torch.cholesky_solve(sides, self.lower), self.border @ sides
        if self.problem.intercept:
            half, gram = self._bordered
            intercept = intercept if totals is None else intercept - torch.linalg.solve(gram, totals)
            result = result - half @ intercept
        return result, intercept

    def solution(self) -> Solution:
        """The optimum for the kernel as it is stored.

        Returns:
            Coefficients, predictions, and a certificate computed from what is left of the gradient by this kernel. What
            its assembly has rounded is not in it: for a certificate of the model itself, precondition conjugate
            gradients with the factor (`DualPrecondition`).
        """
        system, kernel = self.system, self.system.kernel
        linear = kernel.split(self.problem.linear_terms) / self.problem.ridge
        sides = system.root * (kernel.split(self.problem.residual) + system.matrix @ linear)
        totals = linear.reshape(len(linear), -1, kernel.coupled, linear.shape[2]).sum(1)
        return system.certify(kernel.join(system.root * self.solve(sides, totals)[0] - linear))

    def predict(self, cross: Kernel, initial: Tensor) -> Tensor:
        """Outputs of the optimum on other samples.

        Args:
            cross: Kernel with the rows of the other samples and the columns of the training samples.
            initial: Outputs on the other samples before training (m, C).

        Returns:
            Predictions (m, C).
        """
        return self.system.predict(self.solution(), cross, initial)

    @cached_property
    def degrees_of_freedom(self) -> float:
        """Effective number of parameters: the leverages added up over samples and outputs, intercept included."""
        trace = float(self.inverse.diagonal(dim1=-2, dim2=-1).sum())
        return self.problem.samples * self.problem.outputs - self.problem.ridge * self.system.replicas * trace

    @cached_property
    def log_determinant(self) -> float:
        r"""Nats, :math:`\log\det(I + A^{1/2} K A^{1/2} / \lambda)` over all outputs; the intercept is no part of it."""
        diagonal = self.lower.diagonal(dim1=-2, dim2=-1)
        return self.system.replicas * float((diagonal.square() / self.problem.ridge).log().sum())

    def geometry(self, cross: Kernel | None = None) -> RemovalGeometry:
        """What decides how removed samples move the optimum, see `leave_one_out`.

        Args:
            cross: Kernel of other samples, as in `predict`, whose outputs are watched.

        Returns:
            The blocks of every sample.
        """
        samples, coupled, root = self.problem.samples, self.system.kernel.coupled, self.system.root
        inverse = self.inverse.reshape(-1, samples, coupled, samples, coupled)
        own = inverse.diagonal(dim1=1, dim2=3).permute(3, 0, 1, 2).contiguous()
        border = self.border.reshape(-1, coupled, samples, coupled)
        matrix = None if cross is None else self.system.cross_matrix(cross)
        rows = max(len(root), 0 if matrix is None else matrix.shape[1])
        step = max(1, _CHUNK // (rows * coupled * len(inverse)))
        squares, function = [], []
        for start in range(0, samples, step):
            chunk = slice(start, start + step)
            columns = inverse[:, :, :, chunk].reshape(len(inverse), len(root), -1)
            squares.append(_grams(columns, coupled))
            if matrix is not None:
                moved = matrix @ (root * columns)
                moved += border[:, :, chunk].flatten(2).repeat(1, len(moved[0]) // coupled, 1)
                function.append(_grams(moved, coupled) * (coupled / len(moved[0])))
        weight = own - self.problem.ridge * torch.cat(squares)
        return RemovalGeometry(own, weight, border.permute(2, 0, 1, 3), torch.cat(function) if function else None)


def solve_dual(problem: QuadraticProblem, kernel: Kernel, scales: Mapping[str, float] | None = None) -> Solution:
    """The exact optimum, where nothing but it is wanted.

    Args:
        problem: What is minimized.
        kernel: Inner products among the training samples.
        scales: Inverse penalty weights by layer group, see `Kernel.total`.

    Returns:
        The solution of `DualFactor`, whose refusals apply.
    """
    return DualFactor(problem, kernel, scales).solution()


def _grams(columns: Tensor, coupled: int) -> Tensor:
    # (b, rows, k * c) to the inner products among the c columns of each sample (k, b, c, c)
    own = columns.reshape(*columns.shape[:2], -1, coupled).permute(2, 0, 3, 1)
    return own @ own.mT


def _factor(matrix: Tensor, ridge: float, samples: int) -> Tensor:
    top = _largest_eigenvalue(matrix)
    if (top + ridge) / ridge > WORST_CONDITION:
        raise ValueError(
            f"the ridge {ridge:.3g} (sum form) is too small beside the kernel's largest eigenvalue {top:.3g}: the "
            f"condition is {(top + ridge) / ridge:.1e}, double precision allows {WORST_CONDITION:.0e}. "
            f"Take {1.1 * top / WORST_CONDITION:.2g} or more, that is, set method.ridge="
            f"{mean_of_ridge(1.1 * top / WORST_CONDITION, samples):.2g}"
        )
    diagonal = matrix.diagonal(dim1=-2, dim2=-1)
    if ridge > INDEFINITE * top > 0:  # a ridge that hides negative eigenvalues does not make them right
        diagonal.add_(INDEFINITE * top)
        if bool(torch.linalg.cholesky_ex(matrix).info.any()):
            raise ValueError(
                f"the kernel has an eigenvalue below {-INDEFINITE * top:.3g}, its largest is {top:.3g}: no kernel of "
                "Jacobians has. Assemble it without TF32, with the same samples and sketch for rows and columns"
            )
        diagonal.sub_(INDEFINITE * top)
    diagonal.add_(ridge)
    lower: Tensor
    lower, info = torch.linalg.cholesky_ex(matrix)
    if bool(info.any()):
        raise ValueError(
            f"the kernel has an eigenvalue below {-ridge:.3g}, its largest is {top:.3g}: rounding in its assembly "
            f"exceeds the ridge. Assemble it in double precision (trainer.precision=64-true), or set method.ridge="
            f"{mean_of_ridge(INDEFINITE * top, samples):.2g}"
        )
    return lower


def _largest_eigenvalue(matrix: Tensor) -> float:
    generator = torch.Generator().manual_seed(0)
    vector = torch.randn(matrix.shape[-1], 1, generator=generator, dtype=torch.float64).to(matrix.device)
    vector, value = vector.expand(len(matrix), -1, -1), 0.0
    for _ in range(12):
        vector = matrix @ (vector / vector.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny))
        value = float(vector.norm(dim=1).max())
    return value
