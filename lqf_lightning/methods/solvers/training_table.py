"""The training samples of all ranks, as rows: index, label and output at the pre-trained weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.data import Batch
from lqf_lightning.linear import QuadraticProblem, Shard, current_reducer, exactly, ridge_of_mean
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF


@dataclass(frozen=True)
class TrainingTable:
    """Rows of all training samples, by ascending index, the same on every rank.

    Attributes:
        index: Index of every sample (n,).
        label: Class position (n,).
        initial: Output at the pre-trained weights (n, C).
        own_index: Index of this rank's samples, in the order of its batches.
        shard: Where they are among the rows.
    """

    index: Tensor
    label: Tensor
    initial: Tensor
    own_index: Tensor
    shard: Shard

    @classmethod
    def collect(cls, method: "LQF") -> "TrainingTable":
        """Evaluate the network on the training samples, one pass.

        Args:
            method: The method, attached to a trainer.

        Returns:
            The table.
        """
        indices, labels, outputs = [], [], []
        for batch in training_batches(method, "outputs before training"):
            if len(batch.target):
                indices.append(batch.index)
                labels.append(batch.target)
                outputs.append(_at_start(method, batch.input))
        empty = torch.zeros(0, dtype=torch.int64, device=method.device)
        own = torch.cat([empty, *indices])
        rows = torch.cat([torch.zeros(0, len(method.classes), device=method.device), *outputs])
        reducer = current_reducer()
        initial, index = reducer.gather_rows(rows.double(), own)
        label, _ = reducer.gather_rows(torch.cat([empty, *labels]), own)
        shard = Shard(torch.searchsorted(index, own), len(index), reducer)
        return cls(index, label, initial, own, shard)

    def problem(self, method: "LQF", ridge: float | None = None) -> QuadraticProblem:
        """The objective over the samples, in sum form.

        Args:
            method: The method.
            ridge: lambda; None takes the method's mu.

        Returns:
            The problem.
        """
        target = method.target_scale * one_hot(self.label, len(method.classes)).to(self.initial)
        strength = ridge_of_mean(method.ridge, len(self.label)) if ridge is None else ridge
        return QuadraticProblem(self.initial, target, strength, intercept=method.intercept_name is not None)

    def check_order(self, index: Tensor, rows: slice) -> None:
        """Make sure that a batch of a sweep holds the samples that are expected.

        Args:
            index: Index of its samples (B,).
            rows: Their places among this rank's samples.

        Raises:
            ValueError: It holds others.
        """
        expected = self.own_index[rows]
        if not torch.equal(index, expected):
            raise ValueError(
                f"a sweep brought the samples {index.tolist()[:5]}, expected {expected.tolist()[:5]}: with `sweeps` "
                "the data module must repeat the batches of `fixed_train_dataloader()` in their order"
            )


def _at_start(method: "LQF", images: Tensor) -> Tensor:
    with exactly(images.device, False):
        return method.linearized.folded(images).value(images)


def training_batches(method: "LQF", description: str) -> Iterator[Batch]:
    """This rank's training samples as they are evaluated, on the device of the method.

    Args:
        method: The method, attached to a trainer.
        description: Of the work, for the progress bar.

    Yields:
        Batches.
    """
    loader = method.solver.data_module().fixed_train_dataloader()
    for batch in track(loader, description, total=len(loader)):
        yield on_device(method, batch)


def on_device(method: "LQF", batch: Batch) -> Batch:
    """Bring a batch to where the method computes, in its precision.

    Args:
        method: The method, attached to a trainer.
        batch: The batch.

    Returns:
        The same samples.
    """
    moved: Batch = method.trainer.precision_plugin.convert_input(
        method.transfer_batch_to_device(batch, method.device, 0)
    )
    return moved
