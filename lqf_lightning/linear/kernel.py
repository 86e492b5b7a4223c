"""The tangent kernel of a network, by layer group."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

KernelForm = Literal["full", "diagonal", "trace", "last_layer"]


@dataclass(frozen=True)
class Kernel:
    r"""Inner products of per-sample Jacobians, :math:`K = \sum_g J_g M_g^{-1} J_g^T`, one term per layer group.

    A kernel is stored as `blocks` independent matrices of `n * coupled` rows, each for `columns` right-hand sides;
    `blocks * coupled * columns = C`. Everything downstream is written once, in these terms:

    | form | blocks | coupled | columns | what it is |
    |---|---|---|---|---|
    | full | 1 | C | 1 | exact |
    | diagonal | C | 1 | 1 | couplings between outputs left out |
    | trace | 1 | 1 | C | mean of the diagonal ones, shared by all outputs |
    | last_layer | 1 | 1 | C | exact for the last layer alone |

    Other forms than "full" (and "last_layer" for a linear probe) are *surrogates*: they belong to a model with one
    weight vector per output, for which no single dw exists.

    Attributes:
        groups: Matrices by layer group, each (blocks, n * coupled, m * coupled); m = n among training samples. Rows
            are ordered by sample, then by output.
        outputs: Number of outputs C.
        form: See the table.
    """

    groups: Mapping[str, Tensor]
    outputs: int
    form: KernelForm = "full"

    @property
    def coupled(self) -> int:
        """Outputs that share a matrix row by row."""
        return self.outputs if self.form == "full" else 1

    @property
    def blocks(self) -> int:
        """Number of independent matrices."""
        return self.outputs if self.form == "diagonal" else 1

    def total(self, scales: Mapping[str, float] | None = None) -> Tensor:
        r"""The kernel of all groups, :math:`\sum_g s_g K_g`, in double precision.

        Args:
            scales: Inverse penalty weights s_g by group; None means 1. Groups left out count as 0, that is, frozen.

        Returns:
            Matrices (blocks, n * coupled, m * coupled).

        Raises:
            ValueError: A group is unknown or a scale negative.
        """
        scales = dict.fromkeys(self.groups, 1.0) if scales is None else scales
        odd = [name for name, scale in scales.items() if name not in self.groups or scale < 0]
        if odd or not scales:
            raise ValueError(f"scales must be non-negative, for groups among {list(self.groups)}; got {dict(scales)}")
        result = torch.zeros_like(next(iter(self.groups.values())), dtype=torch.float64)
        for name, scale in scales.items():
            result.add_(self.groups[name], alpha=scale)
        return result

    def split(self, rows: Tensor) -> Tensor:
        """Bring outputs into the shape of the kernel's right-hand sides.

        Args:
            rows: Numbers per sample and output (n, C).

        Returns:
            The same numbers as (blocks, n * coupled, columns).
        """
        if self.form == "full":
            return rows.reshape(1, -1, 1)
        return rows.T.unsqueeze(2) if self.form == "diagonal" else rows.unsqueeze(0)

    def join(self, sides: Tensor) -> Tensor:
        """The inverse of `split`.

        Args:
            sides: Right-hand sides (blocks, n * coupled, columns).

        Returns:
            Numbers per sample and output (n, C).
        """
        if self.form == "full":
            return sides.reshape(-1, self.outputs)
        return sides.squeeze(2).T if self.form == "diagonal" else sides.squeeze(0)
