"""The sums over samples that a linear-quadratic problem comes down to in feature space."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Self

import torch
import torch.nn.functional as F
from torch import Tensor

from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.solution import Certificate

_CHUNK = 2**22  # numbers of a block of features in double precision: 32 MiB


@dataclass
class NormalEquations:
    r"""The matrix and the right-hand side of the stationary point, :math:`(H + \Lambda) u = V`.

    .. math:: H = \sum_i a_i \Psi_i^T \Psi_i, \qquad V = \sum_i \Psi_i^T (a_i (y_i - f_{0,i}) - l_i)

    :math:`\Psi_i` are the features :math:`\Phi_i` of a sample, (C, D), with the unit matrix appended if there is an
    intercept, so that u holds dw and then b; the intercept has no penalty, :math:`\Lambda = \mathrm{diag}(\lambda, 0)`.
    Features that all outputs share are (1, D) and u has C columns: nothing is repeated C times.

    Attributes:
        matrix: H (E, E), E = D or D + coupled, in double precision.
        right: V (E, columns).
        energy: `sum_i a_i |y_i - f_0|^2 / 2`, a scalar: the objective at `u = 0`.
        ridge: lambda.
        intercept: Whether the last columns are those of an intercept.
        coupled: C, or 1 for features that the outputs share; `coupled * columns = C`.
    """

    matrix: Tensor
    right: Tensor
    energy: Tensor
    ridge: float
    intercept: bool
    coupled: int

    @classmethod
    def empty(cls, problem: QuadraticProblem, rows: Tensor) -> Self:
        """Sums over no sample, sized for a problem and its features.

        Args:
            problem: Gives ridge, intercept and outputs.
            rows: Features (n, C, D) or (n, 1, D).

        Returns:
            Zeros.

        Raises:
            ValueError: The features are not one row per output of every sample, nor one per sample.
        """
        outputs = problem.outputs
        if rows.ndim != 3 or len(rows) != problem.samples or rows.shape[1] not in (1, outputs):
            raise ValueError(
                f"expected features ({problem.samples}, {outputs}, D), or ({problem.samples}, 1, D) if the outputs "
                f"share them, got {tuple(rows.shape)}"
            )
        coupled = rows.shape[1]
        width = rows.shape[2] + problem.intercept * coupled
        zeros = torch.zeros(width, width + outputs // coupled, dtype=torch.float64, device=rows.device)
        return cls(zeros[:, :width], zeros[:, width:], zeros.new_zeros(()), problem.ridge, problem.intercept, coupled)

    def add(self, problem: QuadraticProblem, rows: Tensor, sign: float = 1.0) -> None:
        """Add the terms of samples, or take them away again.

        Args:
            problem: The samples; its ridge is not looked at.
            rows: Their features (n, C, D) or (n, 1, D).
            sign: -1 takes them away.

        Raises:
            ValueError: The numbers of features or of outputs are not those of the samples before.
        """
        if (rows.shape[2] + self.intercept * self.coupled, rows.shape[1]) != (len(self.matrix), self.coupled):
            known = f"(n, {self.coupled}, {len(self.matrix) - self.intercept * self.coupled})"
            raise ValueError(f"expected features {known} like those before, got {tuple(rows.shape)}")
        if problem.outputs != self.coupled * self.right.shape[1]:
            raise ValueError(f"expected {self.coupled * self.right.shape[1]} outputs, got {problem.outputs}")
        weight, residual = problem.root_weight.square(), problem.residual
        force = (weight * residual - problem.linear_terms).reshape(problem.samples, self.coupled, -1)
        for part, design in self.designs(rows):
            weighted = (design * weight[part, :, None]).flatten(0, 1)
            self.matrix.addmm_(weighted.T, design.flatten(0, 1), alpha=sign)
            self.right.addmm_(design.flatten(0, 1).T, force[part].flatten(0, 1), alpha=sign)
        self.energy += 0.5 * sign * (weight * residual.square()).sum()

    def designs(self, rows: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Walk over features with the columns of the intercept, in blocks of bounded size.

        Args:
            rows: Features (n, coupled, D).

        Yields:
            The samples of the block, and their matrices (B, coupled, E) in double precision.
        """
        step = max(1, _CHUNK // (self.coupled * len(self.matrix)))
        for start in range(0, len(rows), step):
            part = slice(start, start + step)
            design = rows[part].double()
            if self.intercept:
                unit = torch.eye(self.coupled).to(design)
                design = torch.cat([design, unit.expand(len(design), -1, -1)], 2)
            yield part, design

    def reduced(self, reducer: Reducer) -> Self:
        """The sums over all ranks, in one reduction; this object keeps those of its own rank.

        Args:
            reducer: Sums over ranks.

        Returns:
            The same on every rank.
        """
        corner = F.pad(self.energy.reshape(1, 1), (0, self.right.shape[1] - 1, 0, len(self.right) - 1))
        whole = reducer.sum_(torch.cat([self.matrix, self.right, corner], 1))
        width, columns = self.right.shape
        matrix, right, corner = torch.split(whole, [width, columns, columns], 1)
        return replace(self, matrix=matrix, right=right, energy=corner[0, 0])

    @property
    def penalty(self) -> Tensor:
        """The diagonal of Lambda (E,)."""
        result = torch.full((len(self.matrix),), self.ridge, dtype=torch.float64, device=self.matrix.device)
        if self.intercept:
            result[-self.coupled :] = 0
        return result

    def factor(self) -> Tensor:
        """Factor the matrix with its penalty.

        Returns:
            The lower Cholesky factor (E, E).

        Raises:
            ValueError: The matrix is not positive definite in double precision.
        """
        lower: Tensor
        lower, info = torch.linalg.cholesky_ex(self.matrix + self.penalty.diag())
        if int(info) > 0:
            top = float(self.matrix.diagonal().max())
            raise ValueError(
                f"the normal equations are singular in double precision: ridge {self.ridge:.1e} beside curvatures up "
                f"to {top:.1e}, or an intercept without samples. Set method.ridge={max(1e-12 * top, self.ridge):.0e}"
            )
        return lower

    def certificate(self, u: Tensor, gradient: Tensor, objective: float) -> Certificate:
        """Bound the distance to the optimum.

        Args:
            u: The point (E, columns).
            gradient: Gradient of the objective there (E, columns).
            objective: Its value there.

        Returns:
            See there.
        """
        start = self._with_best_intercept(self.right)
        norm = float(self._with_best_intercept(gradient).norm())
        return Certificate(norm / max(float(start.norm()), 1e-300), norm / self.ridge, objective)

    def _with_best_intercept(self, gradient: Tensor) -> Tensor:
        # The gradient in the weights after the intercept has moved to where its own gradient vanishes.
        if not self.intercept:
            return gradient
        free = slice(len(self.matrix) - self.coupled, None)
        shift: Tensor = torch.linalg.solve(self.matrix[free, free], gradient[free])
        return gradient[: free.start] - self.matrix[: free.start, free] @ shift
