"""What is known of the samples of all ranks, column by column."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import current_reducer, exactly

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF


@dataclass(frozen=True)
class Column:
    """Something that is known of every sample.

    Attributes:
        of: Gives the rows of a batch.
        width: Numbers per sample; None for one whole number.
    """

    of: Callable[[Batch], Tensor]
    width: int | None

    @classmethod
    def labels(cls) -> "Column":
        """The class positions.

        Returns:
            The column.
        """
        return cls(lambda batch: batch.target, None)


def gather_columns(
    method: "LQF", batches: Iterable[Batch], columns: Mapping[str, Column]
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Go through this rank's samples and bring the rows of all ranks together.

    Args:
        method: The method.
        batches: Batches of this rank.
        columns: What to note, by name.

    Returns:
        Index of this rank's samples, index of all samples (n,) ascending, and the rows of each column (n, ...), the
        same on every rank, in double precision unless they are whole numbers.
    """
    indices = [torch.zeros(0, dtype=torch.int64, device=method.device)]
    parts = {
        name: [torch.zeros(0, dtype=torch.int64) if column.width is None else torch.zeros(0, column.width).double()]
        for name, column in columns.items()
    }
    for batch in batches:
        if len(batch.target):
            indices.append(batch.index)
            for name, column in columns.items():
                parts[name].append(column.of(batch))
    own, reducer = torch.cat(indices), current_reducer()
    rows = {name: torch.cat([part.to(own.device) for part in found]) for name, found in parts.items()}
    gathered = {name: reducer.gather_rows(found, own) for name, found in rows.items()}
    return own, next(iter(gathered.values()))[1], {name: found for name, (found, _) in gathered.items()}


def output_at_start(method: "LQF", batch: Batch) -> Tensor:
    """What the network gives before training.

    Args:
        method: The method.
        batch: Samples, at least one.

    Returns:
        Outputs (B, C).
    """
    with exactly(batch.input.device, False):
        return method.linearized.folded(batch.input).value(batch.input)
