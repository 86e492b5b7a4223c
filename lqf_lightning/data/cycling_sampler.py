"""A few samples over and over, in an order that is fresh every time."""

from collections.abc import Iterator

import torch
from torch.utils.data import Sampler

from lqf_lightning.data.seeding import mix_seed


class CyclingSampler(Sampler[tuple[int, int, int]]):
    """Shuffled samples of one process for a set number of steps, as keys (epoch, position, round).

    The order is one permutation after another, each drawn from (seed, epoch, round) and all dealt out to the processes
    like cards. Step `t` of all processes together is therefore the same collection of samples for every number of
    processes that divides the batch size. A step may be larger than the set: then samples repeat within it.

    Args:
        size: Number of samples N, at least 1.
        length: Samples of this process per epoch.
        seed: Seed of the run.
        rank: This process.
        world_size: Number of processes.
        batch_size: Samples per step of one process.
    """

    def __init__(
        self, size: int, length: int, seed: int, *, rank: int = 0, world_size: int = 1, batch_size: int = 1
    ) -> None:
        self.size = size
        self.length = length
        self.seed = seed
        self.rank = rank
        self.world_size = world_size
        self.batch_size = batch_size
        self.epoch = 0
        self.skip = 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the permutations; Lightning calls this before every epoch.

        Args:
            epoch: Number of the epoch.
        """
        self.epoch = epoch

    def __iter__(self) -> Iterator[tuple[int, int, int]]:
        """Walk through this process's share, leaving out the first `skip` samples.

        Yields:
            Epoch and position of a sample, and how often the epoch went through all samples before.
        """
        epoch, drawn, order = self.epoch, -1, [0]
        for dealt in range(self.skip, self.length):
            number, place = divmod(dealt * self.world_size + self.rank, self.size)
            if number != drawn:
                drawn, order = number, self._permutation(epoch, number)
            yield epoch, order[place], number

    def __len__(self) -> int:
        """Count the samples of this process in one whole epoch.

        Returns:
            The same number on every process.
        """
        return self.length

    def _permutation(self, epoch: int, number: int) -> list[int]:
        # Images are augmented with seeds of the same kind that name a sample; no sample has the index -1.
        generator = torch.Generator().manual_seed(mix_seed(self.seed, epoch, -1, number))
        order: list[int] = torch.randperm(self.size, generator=generator).tolist()
        return order
