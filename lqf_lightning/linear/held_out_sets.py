"""Which samples are left out together, and the algebra of deleting their rows from a dual system."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem

_CHUNK = 2**24  # numbers that are rearranged at a time, 128 MiB

Factors = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class HeldOutSets:
    """A partition of the samples; each set is predicted by the model that has seen none of it.

    Attributes:
        rows: Rows of the kernel by set, sets of one size in one tensor (sets, rows per set).
    """

    rows: tuple[Tensor, ...]

    @classmethod
    def of(cls, problem: QuadraticProblem, kernel: Kernel, together: Tensor | None = None) -> "HeldOutSets":
        """Make sets from numbers.

        Args:
            problem: The problem whose samples they are.
            kernel: Its kernel.
            together: Number by sample (n,), int64; samples with the same number are one set. None: each is its own.

        Returns:
            The sets.

        Raises:
            ValueError: The numbers do not fit, or a set holds all samples that the intercept is fitted to.
        """
        n, device = problem.samples, next(iter(kernel.groups.values())).device
        if together is None:
            together = torch.arange(n)
        if together.shape != (n,) or together.is_floating_point() or together.dtype == torch.bool:
            raise ValueError(f"`together` must be whole numbers ({n},), got {together.dtype} {tuple(together.shape)}")
        _, which, counts = torch.unique(together.to(device), return_inverse=True, return_counts=True)
        present = (problem.root_weight[:, 0] > 0).double().to(device)
        if problem.intercept and bool(
            (torch.zeros_like(counts, dtype=present.dtype).index_add_(0, which, present) == present.sum()).any()
        ):
            raise ValueError(
                "all samples of positive weight are left out together, which leaves none to fit the intercept to: "
                "leave-one-out needs two such sets of samples at least"
            )
        members = which.argsort(stable=True).split(counts.tolist())
        sized = [torch.stack([own for own in members if len(own) == size]) for size in sorted(set(counts.tolist()))]
        within = torch.arange(kernel.coupled, device=device)
        return cls(tuple((kernel.coupled * own.unsqueeze(2) + within).flatten(1) for own in sized))

    def factor(self, inverse: Tensor) -> Factors:
        """Decompose the blocks of the sets.

        Args:
            inverse: G (b, N, N).

        Returns:
            LU factors and pivots of :math:`G_{SS}`, by size.
        """
        return [torch.linalg.lu_factor(inverse[:, own.unsqueeze(2), own.unsqueeze(1)]) for own in self.rows]

    def solve(self, factors: Factors, sides: Tensor) -> Tensor:
        r"""Solve :math:`G_{SS} t_S = r_S` for all sets.

        Args:
            factors: Of `factor`.
            sides: r (b, N, s).

        Returns:
            t (b, N, s).
        """
        result = torch.empty_like(sides)
        for own, (lower, pivots) in zip(self.rows, factors, strict=True):
            result[:, own] = torch.linalg.lu_solve(lower, pivots, sides[:, own])
        return result

    def sandwich(self, inverse: Tensor, left: Tensor, right: Tensor) -> Callable[[slice], Tensor]:
        r"""The product :math:`G D G` with :math:`D = \mathrm{diag}_S(u_S t_S^T)`, a few rows at a time.

        One column per set and side is enough (2 N^2 times their number) where there are fewer of them than rows.

        Args:
            inverse: G (N, N), symmetric.
            left: u (N, s).
            right: t (N, s).

        Returns:
            A function from a range of rows to these rows (rows, N), as a new tensor.
        """
        if left.shape[1] * sum(len(own) for own in self.rows) < len(inverse):
            first, second = self._columns(inverse, left), self._columns(inverse, right)
            return lambda rows: first[rows] @ second.T
        middle = [left[own] @ right[own].mT for own in self.rows]

        def product(rows: slice) -> Tensor:
            part = inverse[rows]
            moved = torch.empty_like(part)
            for own, between in zip(self.rows, middle, strict=True):
                moved[:, own.flatten()] = torch.einsum("Ngr,grq->Ngq", part[:, own], between).flatten(1)
            return moved @ inverse

        return product

    def _columns(self, inverse: Tensor, sides: Tensor) -> Tensor:
        # Each set's columns of the inverse times its own sides (N, sets * s).
        step = max(1, _CHUNK // len(inverse))
        parts = [
            torch.cat([torch.einsum("Ngr,grs->Ngs", part[:, own], sides[own]).flatten(1) for own in self.rows], 1)
            for part in torch.split(inverse, step)
        ]
        return torch.cat(parts)
