"""The training samples of all ranks, as rows: index, label and output at the pre-trained weights."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

from lqf_lightning.data import Batch
from lqf_lightning.linear import QuadraticProblem, Shard, current_reducer, ridge_of_mean
from lqf_lightning.methods.solvers.sample_columns import Column, gather_columns, output_at_start
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
        reference: What the method's reference answers (n, C_old), if it has one.
    """

    index: Tensor
    label: Tensor
    initial: Tensor
    own_index: Tensor
    shard: Shard
    reference: Tensor | None = None

    @classmethod
    def collect(cls, method: "LQF") -> "TrainingTable":
        """Evaluate the network, and the reference if there is one, on the training samples, one pass.

        Args:
            method: The method, attached to a trainer.

        Returns:
            The table.
        """
        matching, outputs = method.matching, len(method.classes)
        columns = {"label": Column.labels(), "initial": Column(partial(output_at_start, method), outputs)}
        if matching is not None:
            columns["reference"] = Column(matching.outputs, len(matching.reference.classes))
        own, index, rows = gather_columns(method, training_batches(method, "outputs before training"), columns)
        if matching is not None:
            matching.settle_scale(rows["reference"], rows["label"])
        shard = Shard(torch.searchsorted(index, own), len(index), current_reducer())
        return cls(index, rows["label"], rows["initial"], own, shard, rows.get("reference"))

    def labels(self, method: "LQF", ridge: float | None = None) -> QuadraticProblem:
        """The objective over the samples, in sum form, that has nothing but labels to learn from.

        The ridge is that of the mean form times the number of samples, those of weight 0 included, as in the loss of a
        batch: the sum of their weights plays no part.

        Args:
            method: The method.
            ridge: lambda; None takes the method's mu.

        Returns:
            The problem.
        """
        target = method.target_scale * one_hot(self.label, len(method.classes)).to(self.initial)
        strength = ridge_of_mean(method.ridge, len(self.label)) if ridge is None else ridge
        weight, intercept = method.weights_of(self.index), method.intercept_name is not None
        return QuadraticProblem(self.initial, target, strength, weight, intercept=intercept)

    def problem(self, method: "LQF", ridge: float | None = None) -> QuadraticProblem:
        """The objective that the method minimizes, in sum form and up to a constant.

        Args:
            method: The method.
            ridge: lambda; None takes the method's mu.

        Returns:
            The problem, its targets and sample weights those of labels and reference together.
        """
        labels, matching = self.labels(method, ridge), method.matching
        if matching is None or self.reference is None:
            return labels
        return matching.problem(labels, self.reference, self.label).at(matching.alpha, matching.beta)

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


def training_batches(method: "LQF", description: str) -> Iterator[Batch]:
    """This rank's training samples as they are evaluated, on the device of the method.

    Args:
        method: The method, attached to a trainer.
        description: Of the work, for the progress bar.

    Yields:
        Batches.
    """
    yield from fixed_batches(method, method.solver.data_module().fixed_train_dataloader(), description)


def fixed_batches(method: "LQF", loader: DataLoader[Batch], description: str) -> Iterator[Batch]:
    """Samples of any loader, on the device of the method.

    Args:
        method: The method, attached to a trainer.
        loader: Samples of this rank.
        description: Of the work, for the progress bar.

    Yields:
        Batches.
    """
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
