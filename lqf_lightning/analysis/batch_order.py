"""The batches that a run is going to see: they are drawn by its seed, so they are known in advance."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from lqf_lightning.data.sampler import TrainingSampler


def batch_order(sampler: TrainingSampler, batches: int | None = None) -> Iterator[Tensor]:
    """Positions of the samples of every step, of all processes together; repeated ones of a last step included.

    Args:
        sampler: The order of one process. It is left as it is.
        batches: Steps per epoch; None: all that the sampler has.

    Yields:
        Positions among the training samples (B,), epoch after epoch, without end.

    Example:
        >>> order = batch_order(TrainingSampler(5, seed=0, batch_size=2))
        >>> [len(next(order)) for _ in range(6)]
        [2, 2, 1, 2, 2, 1]
    """
    size, share = sampler.batch_size, {"world_size": sampler.world_size, "drop_last": sampler.drop_last}
    ranks = [
        TrainingSampler(sampler.size, sampler.seed, rank=rank, batch_size=size, **share)  # type: ignore[arg-type]  # mypy takes the dictionary for one of a single type
        for rank in range(sampler.world_size)
    ]
    number = -(-len(ranks[0]) // size) if batches is None else batches
    for epoch in itertools.count():
        for rank in ranks:
            rank.set_epoch(epoch)
        orders = [torch.tensor([position for _, position in rank], dtype=torch.int64) for rank in ranks]
        for step in range(number):
            yield torch.cat([order[step * size : (step + 1) * size] for order in orders])
