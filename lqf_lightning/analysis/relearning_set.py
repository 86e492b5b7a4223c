"""The samples that models relearn from, kept in memory: members of the cohort among retained ones."""

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.solvers.training_table import on_device


@dataclass(frozen=True)
class RelearningSet:
    """Training samples of all processes, and the images of those that this process has.

    Attributes:
        index: Index of all samples (s,), ascending, the same on every rank.
        members: Index of those that belong to the cohort (k,).
        cohort: Number of samples of the whole cohort.
        own: Samples of this rank, on the device of the method.
    """

    index: Tensor
    members: Tensor
    cohort: int
    own: Batch

    def rows(self, chosen: Tensor) -> Batch:
        """Those of some samples that this rank has.

        Args:
            chosen: Their index.

        Returns:
            A batch, possibly without rows.
        """
        found = torch.isin(self.own.index, chosen.to(self.own.index.device))
        return Batch(self.own.input[found], self.own.target[found], self.own.index[found])


def load_relearning_set(
    method: Method, data: Any, cohort: Tensor, retained: Tensor, samples: int, seed: int
) -> RelearningSet:
    """Draw and load the samples to relearn from; all ranks have to call this together.

    Args:
        method: The method, attached to a trainer.
        data: Has `chosen_dataloader`, which still knows the cohort.
        cohort: Index of the samples to forget (f,), int64.
        retained: Index of the other training samples (r,).
        samples: How many are wanted in all. The cohort takes half of them at most, by lot.
        seed: Of the lots.

    Returns:
        The samples.

    Raises:
        ValueError: A sample of the cohort is retained too, or the data module does not have all samples.
    """
    both = int(torch.isin(retained.cpu(), cohort.cpu()).sum())
    if both:
        raise ValueError(f"{both} samples of the cohort are among the retained ones. Set retained to the others")
    draw = torch.Generator().manual_seed(seed)
    members = _some(cohort, samples // 2, draw)
    index = torch.cat([members, _some(retained, samples - len(members), draw)]).sort().values
    linear = cast(LQF, method)  # of which nothing is used but trainer and device, which every method has
    batches = [on_device(linear, batch) for batch in data.chosen_dataloader(index)]
    own = Batch(*(torch.cat(parts) for parts in zip(*batches, strict=True)))
    if not bool(torch.isin(own.index.cpu(), index).all()):
        raise ValueError("`chosen_dataloader` brought samples that were not asked for")
    return RelearningSet(index, members, len(cohort), own)


def _some(index: Tensor, number: int, draw: torch.Generator) -> Tensor:
    ordered = index.cpu().sort().values
    return ordered[torch.randperm(len(ordered), generator=draw)[:number]].sort().values
