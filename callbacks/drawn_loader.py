"""An evaluation loader of fewer samples."""

from typing import Any, cast

import torch
from torch.utils.data import DataLoader

from lqf_lightning.data import Batch


def draw_at_most(number: int, loader: DataLoader[Batch], seed: int = 0) -> DataLoader[Batch]:
    """Keep so many samples of a loader, drawn by lot; those that are not drawn are not even decoded.

    Args:
        number: Most samples of all ranks together.
        loader: Batches of this rank, whose batch sampler names positions in the data set.
        seed: Another seed draws others.

    Returns:
        The loader itself if it has no more, else one of the same options; the lot is the same for every number of
        ranks.
    """
    size = len(loader.dataset)  # type: ignore[arg-type]  # is sized
    if size <= number:
        return loader
    chosen = set(torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:number].tolist())
    shares = cast(Any, loader.batch_sampler)
    kept = [[position for position in share if position in chosen] for share in shares]
    return DataLoader(
        loader.dataset,
        batch_sampler=[share for share in kept if share],
        collate_fn=loader.collate_fn,
        num_workers=loader.num_workers,
        pin_memory=loader.pin_memory,
    )
