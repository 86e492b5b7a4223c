"""Which samples a process sees, and in which order."""

import math
from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from lqf_lightning.data.seeding import mix_seed


class TrainingSampler(Sampler[tuple[int, int]]):
    """Shuffled samples of one process, as keys (epoch, position).

    The order is a permutation drawn from (seed, epoch), dealt out to the processes like cards. Step `t` of all
    processes together is therefore the same set of samples for every number of processes that divides the batch size.
    Only the last step of an epoch may repeat up to `world_size - 1` samples, so that all processes have equally many.

    Args:
        size: Number of training samples N.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        batch_size: Samples per step of one process.
        drop_last: Leave out the samples that do not fill a whole step; then nothing is repeated.
    """

    def __init__(
        self, size: int, seed: int, *, rank: int = 0, world_size: int = 1, batch_size: int = 1, drop_last: bool = False
    ) -> None:
        self.size = size
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.drop_last = drop_last
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutation; Lightning calls this before every epoch.

        Args:
            epoch: Number of the epoch.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int]]:
        """Walk through this process's share, leaving out the first `skip` samples.

        Yields:
            Epoch and position of a sample.
        """
        generator = torch.Generator().manual_seed(mix_seed(self.seed, self.epoch))
        order = torch.randperm(self.size, generator=generator)
        total = len(self) * self.world_size
        order = order.repeat(math.ceil(total / max(self.size, 1)))[:total]
        epoch = self.epoch
        for position in order[self.rank :: self.world_size][self.skip :].tolist():
            yield epoch, position

    def __len__(self) -> int:
        """Count the samples of this process in one whole epoch.

        Returns:
            The same number on every process.
        """
        if self.drop_last:
            return self.size // (self.batch_size * self.world_size) * self.batch_size
        return math.ceil(self.size / self.world_size)


class UnpaddedSampler(Sampler[list[int]]):
    """Batches of every sample exactly once over all processes, in order, for evaluation.

    Shares differ by at most one sample. A process without any sample gets one batch without rows: it then runs the same
    hooks as the others, which would wait forever for it in their first collective call otherwise.

    Args:
        size: Number of samples N.
        rank: This process.
        world_size: Number of processes.
        batch_size: Samples per batch of one process.
    """

    def __init__(self, size: int, *, rank: int = 0, world_size: int = 1, batch_size: int = 1) -> None:
        self.share = range(rank, size, world_size)
        self.batch_size = batch_size

    def __iter__(self) -> Iterator[list[int]]:
        """Walk through this process's share.

        Yields:
            Positions of the samples of one batch.
        """
        for batch in range(len(self)):
            yield list(self.share[batch * self.batch_size : (batch + 1) * self.batch_size])

    def __len__(self) -> int:
        """Count the batches of this process.

        Returns:
            At least 1.
        """
        return max(1, math.ceil(len(self.share) / self.batch_size))


class SweepSampler(Sampler[list[int]]):
    """The batches of an `UnpaddedSampler` several times over, as many on every process.

    Where a process has fewer batches than another, empty ones follow, so that all reach the end of a sweep together.

    Args:
        size: Number of samples N.
        sweeps: How often every sample comes.
        rank: This process.
        world_size: Number of processes.
        batch_size: Samples per batch of one process.
    """

    def __init__(self, size: int, sweeps: int, *, rank: int = 0, world_size: int = 1, batch_size: int = 1) -> None:
        share = {"world_size": world_size, "batch_size": batch_size}
        self.batches = list(UnpaddedSampler(size, rank=rank, **share))
        # The first process has the most.
        self.batches += [[]] * (len(UnpaddedSampler(size, rank=0, **share)) - len(self.batches))
        self.sweeps = sweeps

    def __iter__(self) -> Iterator[list[int]]:
        """Walk through this process's share, `sweeps` times.

        Yields:
            Positions of the samples of one batch.
        """
        for _ in range(self.sweeps):
            yield from self.batches

    def __len__(self) -> int:
        """Count the batches of all sweeps.

        Returns:
            The same number on every process.
        """
        return self.sweeps * len(self.batches)
