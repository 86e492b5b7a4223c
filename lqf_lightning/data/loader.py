"""Loaders: what they have in common, and one that can stop and go on in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader

from lqf_lightning.data.batch import Batch
from lqf_lightning.data.copies import FixedDataset
from lqf_lightning.data.cycling_sampler import CyclingSampler
from lqf_lightning.data.dataset import Collate, ImageDataset
from lqf_lightning.data.sampler import SweepSampler, TrainingSampler, UnpaddedSampler
from lqf_lightning.data.world import World


class TrainingLoader(DataLoader[Batch]):
    """Training batches whose order depends on the epoch, also right after a run was resumed.

    Iteration begins with the first `next`, not with `iter`: Lightning creates the iterator of a resumed run before it
    tells the sampler the epoch, and worker processes would already have been sent the samples of epoch 0.

    Args:
        dataset: The training samples.
        sampler: Their order.
        **options: Passed on to torch's loader.
    """

    def __init__(self, dataset: ImageDataset, sampler: TrainingSampler | CyclingSampler, **options: Any) -> None:
        super().__init__(dataset, sampler=sampler, **options)  # type: ignore[arg-type]  # collated to Batch
        self.order = sampler
        self._taken = (0, 0)
        self._resume = (-1, 0)

    def __iter__(self) -> Iterator[Batch]:  # type: ignore[override]  # torch names its own class
        """Walk through the rest of the epoch.

        Yields:
            Batches.
        """
        epoch, done = self.order.epoch, 0
        if self._resume[0] == epoch:
            done = self._resume[1]
        self._resume = (-1, 0)
        self.order.skip = done * self.order.batch_size
        for batch in super().__iter__():
            done += 1
            self._taken = (epoch, done)
            yield batch

    def state_dict(self) -> dict[str, int]:
        """Tell how far the current epoch is; Lightning stores this in checkpoints.

        Returns:
            Epoch, and batches handed out in it.
        """
        return {"epoch": self._taken[0], "batches": self._taken[1]}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Leave out, once, the batches that were handed out before the checkpoint.

        Args:
            state: What `state_dict` returned.
        """
        self._resume = (state["epoch"], state["batches"])
        self._taken = self._resume


def loader_options(world: World, num_workers: int | None, size: int, views: int = 0) -> dict[str, Any]:
    """What all loaders of a run have in common.

    Args:
        world: This process among the others.
        num_workers: Worker processes; None: the cores of this process, up to 8.
        size: Side of the images in pixels.
        views: Views per sample; 0: one image.

    Returns:
        Arguments of a `DataLoader`.
    """
    workers = world.share_cores() if num_workers is None else num_workers
    return {
        "collate_fn": Collate(size, views),
        "num_workers": workers,
        "persistent_workers": workers > 0,
        "pin_memory": torch.cuda.is_available(),
    }


def evaluation_loader(
    data: FixedDataset, world: World, batch_size: int, num_workers: int | None, size: int, sweeps: int = 0
) -> DataLoader[Batch]:
    """Batches of one process in order, without chance; together the processes see every sample exactly once.

    Args:
        data: The samples.
        world: This process among the others.
        batch_size: Samples per step of all processes together, rounded up to as many on each.
        num_workers: Worker processes; None: the cores of this process, up to 8.
        size: Side of the images in pixels.
        sweeps: How often every sample comes in an epoch of training; 0: an evaluation.

    Returns:
        A loader; the sizes of the shares may differ.
    """
    share = {"rank": world.rank, "world_size": world.size, "batch_size": -(-batch_size // world.size)}
    sampler = SweepSampler(len(data), sweeps, **share) if sweeps else UnpaddedSampler(len(data), **share)
    options = {"batch_sampler": sampler, **loader_options(world, num_workers, size)}
    return DataLoader(data, **options)  # type: ignore[arg-type]  # a map of Batch
