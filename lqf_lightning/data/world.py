"""Which process this is, and among how many."""

import os
from typing import NamedTuple

import torch.distributed as dist
from lightning.pytorch import Trainer


class World(NamedTuple):
    """This process among the processes of the run.

    Attributes:
        rank: Number of this process.
        size: Number of processes.
        local_size: Number of processes on this machine.
    """

    rank: int
    size: int
    local_size: int

    @classmethod
    def find(cls, trainer: Trainer | None) -> "World":
        """Ask the trainer, or torch where there is none.

        Args:
            trainer: The trainer that the data is attached to.

        Returns:
            The first of one where neither knows of others.
        """
        if trainer is not None:
            return cls(trainer.global_rank, trainer.world_size, max(1, trainer.num_devices))
        if dist.is_available() and dist.is_initialized():
            size = dist.get_world_size()
            return cls(dist.get_rank(), size, int(os.environ.get("LOCAL_WORLD_SIZE", size)))
        return cls(0, 1, 1)

    def share_batch(self, batch_size: int) -> int:
        """Divide the global batch.

        Args:
            batch_size: Samples per step of all processes together.

        Returns:
            Samples per step of one process.

        Raises:
            ValueError: The batch cannot be divided evenly.
        """
        if batch_size % self.size:
            below = batch_size // self.size * self.size
            fitting = " or ".join(str(size) for size in (below, below + self.size) if size)
            raise ValueError(
                f"data.batch_size={batch_size} counts the samples of all processes together and cannot be divided over "
                f"{self.size} processes; set data.batch_size={fitting}"
            )
        return batch_size // self.size

    def share_cores(self) -> int:
        """Divide the processor cores of this machine.

        Returns:
            Worker processes for one loader, from 1 to 8.
        """
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        return max(1, min(8, cores // self.local_size))
