"""A tiny problem whose labels can only be learned by heart, shared out over ranks, and its optima without a cohort."""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning import Callback
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset, default_collate

from lqf_lightning.analysis.with_weights import trained_weights
from lqf_lightning.data import Batch
from lqf_lightning.data.sampler import UnpaddedSampler
from lqf_lightning.methods import Method
from methods.dense_lqf import build
from methods.tensors import TensorData, build_trainer, draw, fit_on

RIDGE = 0.01
EXACT = {"solver": "kernel", "ridge": RIDGE}
COHORT = torch.tensor([2, 5, 6, 11, 17, 20])


class ShardedData(TensorData):
    """Every rank has its share of the samples, each sample once, as an image data module has it."""

    def chosen_dataloader(self, indices: Tensor) -> DataLoader[Batch]:
        return self._share("train", indices)

    def fixed_train_dataloader(self) -> Any:
        return self._share("train")

    def val_dataloader(self) -> Any:
        return self._share("val")

    def test_dataloader(self) -> Any:
        return self._share("test")

    def _share(self, split: str, indices: Tensor | None = None) -> Any:
        if self.splits[split] is None:
            return []
        images, target = self.splits[split]
        chosen = torch.arange(len(target)) if indices is None else indices
        rows = TensorDataset(images[chosen], target[chosen], chosen)
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        batches = UnpaddedSampler(len(rows), rank=rank, world_size=world, batch_size=self.batch_size)
        return DataLoader(rows, batch_sampler=batches, collate_fn=_collate)


def _collate(rows: list[tuple[Tensor, ...]]) -> Batch:
    if not rows:  # of a rank without samples
        nothing = torch.zeros(0, dtype=torch.int64)
        return Batch(torch.zeros(0, 3, 6, 6, dtype=torch.float64), nothing, nothing)
    return Batch(*default_collate(rows))


def make_data(samples: int = 24, batch_size: int = 5, **others: Any) -> ShardedData:
    splits = {"val": draw(9, 2), "test": draw(10, 3)} | others
    return ShardedData(*draw(samples, 1), batch_size, **splits)


def retained(samples: int = 24) -> Tensor:
    index = torch.arange(samples)
    return index[~torch.isin(index, COHORT)]


class _Look(Callback):
    def __init__(self, look: Callable[[Method], Any]) -> None:
        self.look, self.found = look, None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        self.found = self.look(pl_module)


def attached(look: Callable[[Method], Any], method: Method | None = None, data: ShardedData | None = None) -> Any:
    """What `look` finds with a method that is attached to a trainer."""
    seen = _Look(look)
    fit_on(build_trainer(1, seen), method or build(**EXACT), data or make_data())
    return seen.found


def optimum(keep: Tensor | None = None) -> dict[str, Tensor]:
    """Weights trained on some samples to the optimum."""
    images, label = draw(24, 1)
    keep = torch.arange(24) if keep is None else keep
    method = build(**EXACT)
    fit_on(build_trainer(1), method, TensorData(images[keep], label[keep], 5))
    return trained_weights(method)
