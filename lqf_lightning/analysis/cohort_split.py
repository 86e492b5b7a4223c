"""The training samples of a run, divided into those that stay and those that are forgotten."""

from collections.abc import Iterator, Sized
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lqf_lightning.data import Batch
from lqf_lightning.data.seeding import mix_seed
from lqf_lightning.linear import current_reducer
from lqf_lightning.methods import Method
from lqf_lightning.methods.solvers.training_table import on_device


class SampleBatches:
    """This rank's share of some training samples, as they are evaluated, on the device of the method.

    Args:
        method: The method, attached to a trainer.
        loader: The samples.
    """

    def __init__(self, method: Method, loader: DataLoader[Batch]) -> None:
        self.method, self.loader = method, loader

    def __iter__(self) -> Iterator[Batch]:
        """Walk through the samples, as often as one likes.

        Yields:
            Batches (B, ...), B may be 0.
        """
        for batch in self.loader:
            yield on_device(cast(Any, self.method), batch)


class SampleInputs:
    """The images of `SampleBatches`, without labels and without empty batches.

    Args:
        batches: The samples.
    """

    def __init__(self, batches: SampleBatches) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Tensor]:
        """Walk through the images, as often as one likes.

        Yields:
            Images (B, ...), B at least 1.
        """
        for batch in self.batches:
            if len(batch.target):
                yield batch.input


@dataclass(frozen=True)
class CohortSplit:
    """What is forgotten and what stays, the same on every rank.

    Attributes:
        method: The method, attached to a trainer whose data module holds all samples.
        forgotten: Manifest index of the cohort (f,), ascending.
        retained: Manifest index of the other training samples (r,), ascending.
        classes: Positions of the classes that have training samples, all of them in the cohort.
        pure: Whether the cohort has no samples of other classes.
    """

    method: Method
    forgotten: Tensor
    retained: Tensor
    classes: tuple[int, ...]
    pure: bool

    @classmethod
    def of(cls, method: Method, cohort: Tensor) -> "CohortSplit":
        """Divide the training samples of a run.

        Args:
            method: The method, attached to a trainer whose data module holds all samples.
            cohort: Manifest index of the samples to forget.

        Returns:
            The division.

        Raises:
            ValueError: The cohort is empty, has members that are no training samples, or leaves none.
        """
        rows = _data(method).manifest.rows("train")
        index, label = (torch.as_tensor(rows[column].to_numpy(copy=True)) for column in ("index", "label"))
        forgotten = torch.tensor(sorted(set(cohort.tolist())), dtype=torch.int64)
        gone = torch.isin(index, forgotten)
        if int(gone.sum()) != len(forgotten) or not 0 < len(forgotten) < len(index):
            odd = forgotten[~torch.isin(forgotten, index)].tolist()
            raise ValueError(
                f"a cohort has between 1 and {len(index) - 1} of the {len(index)} training samples, got "
                f"{len(forgotten)}, of which {len(odd)} are none: {odd[:5]}. Set cohort=[{int(index[0])}]"
            )
        stay = set(label[~gone].tolist())
        classes = tuple(sorted(set(label[gone].tolist()) - stay))
        pure = not stay & set(label[gone].tolist())
        return cls(method, forgotten, index[~gone].sort().values, classes, pure)

    def batches(self, indices: Tensor) -> SampleBatches:
        """Training samples in order, each once over all ranks.

        Args:
            indices: Manifest index of the samples.

        Returns:
            This rank's share.
        """
        return SampleBatches(self.method, _data(self.method).chosen_dataloader(indices))

    def shuffled(self, samples: SampleBatches, batch_size: int, seed: int, epoch: int) -> SampleBatches:
        """Training samples in an order drawn by lot; batch t of all ranks together is the same for any number of ranks.

        Args:
            samples: In order.
            batch_size: Samples per batch of all ranks together.
            seed: Decides the order, together with `epoch`.
            epoch: See there.

        Returns:
            This rank's share, as many batches on every rank, some of them possibly empty.
        """
        plain, reducer = samples.loader, current_reducer()
        count = len(cast(Sized, plain.dataset))
        order = torch.randperm(count, generator=torch.Generator().manual_seed(mix_seed(seed, epoch))).tolist()
        steps = [order[at : at + batch_size][reducer.rank :: reducer.world_size] for at in range(0, count, batch_size)]
        build = partial(DataLoader[Batch], plain.dataset, collate_fn=plain.collate_fn, num_workers=plain.num_workers)
        return SampleBatches(self.method, build(batch_sampler=steps))

    @property
    def batch_size(self) -> int:
        """Samples per training step of the run, of all ranks together."""
        return int(_data(self.method).batch_size)


def _data(method: Method) -> Any:
    return cast(Any, method.trainer).datamodule
