"""Rows of numbers that stand for the Jacobians of samples."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.reducer import Reducer


@dataclass(frozen=True)
class Features:
    r"""Rows that stand for the Jacobians of samples: :math:`K_{ij} = \Phi_i \Phi_j^T`.

    A metric M is part of them, :math:`\Phi = J M^{-1/2}`.

    Attributes:
        rows: The features of this rank's samples (n, C, D), or (n, 1, D) if all outputs share them and have weights of
            their own, as in a linear probe.
        index: Index of every sample in the data set (n,), int64; None means their order, in a single process.
    """

    rows: Tensor
    index: Tensor | None = None

    def positions(self, reducer: Reducer) -> Tensor:
        """The index of every sample of this rank.

        Args:
            reducer: Says how many ranks there are.

        Returns:
            The index (n,).

        Raises:
            ValueError: It is missing, and there are several ranks.
        """
        if self.index is not None:
            return self.index
        if reducer.world_size > 1:
            raise ValueError(
                f"features of {reducer.world_size} ranks need the index of every sample in the data set, or repeated "
                "samples would count twice: pass Features(rows, index)"
            )
        return torch.arange(len(self.rows), device=self.rows.device)


def first_copies(index: Tensor, reducer: Reducer) -> Tensor:
    """Find the rows that count, where samplers repeat samples to give every rank as many.

    Args:
        index: Index of every row of this rank (n,).
        reducer: Gathers over ranks.

    Returns:
        Which rows are the first of their index on the lowest rank that has it (n,), bool.

    Example:
        >>> first_copies(torch.tensor([4, 2, 4]), Reducer()).tolist()
        [True, True, False]
    """
    place = torch.arange(len(index), device=index.device)
    owners, _ = reducer.gather_rows(torch.stack([torch.full_like(place, reducer.rank), place], 1), index)
    kept = torch.zeros(len(index), dtype=torch.bool, device=index.device)
    kept[owners[owners[:, 0] == reducer.rank, 1]] = True
    return kept
