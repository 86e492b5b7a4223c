"""Passes over the training samples that are there, counted as the work of training steps."""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import (
    ConjugateGradient,
    FoldedJacobian,
    Metric,
    Shard,
    current_reducer,
    exactly,
)
from lqf_lightning.linear.conjugate_gradient import Precondition
from lqf_lightning.methods import LQF
from lqf_lightning.methods.solvers.sample_columns import Column, gather_columns
from lqf_lightning.methods.solvers.sweep import PullSweep, PushSweep
from lqf_lightning.methods.solvers.training_table import TrainingTable, training_batches

Tensors = dict[str, Tensor]
_STEP = 5  # evaluations of the convolutions in a training step: 3 of J v, 2 more of J^T r


class CountedPasses:
    """The linear-quadratic problem of the present training samples, and products with their Jacobian.

    The first pass, at once, brings outputs at the pre-trained weights and what a movement adds to them. All methods
    are collective.

    Args:
        method: The method, attached to a trainer.
        movement: dw by parameter name, the intercept not included.

    Attributes:
        table: The samples of all ranks.
        image: `J dw` (n, C) of the movement.
        problem: What is minimized: sum form, lambda = n mu of the samples that are there.
        metric: Of the penalty.
        units: Work so far, in evaluations of the convolutions per sample: 3 per `J v`, 1 and 2 per side of `J^T r`.

    Raises:
        ValueError: There is no training sample.
    """

    def __init__(self, method: LQF, movement: Mapping[str, Tensor]) -> None:
        self.method, outputs = method, len(method.classes)
        moves = any(bool(entry.any()) for entry in movement.values())
        columns = {"label": Column.labels(), "outputs": Column(_Outputs(method, movement), 2 * outputs)}
        batches = training_batches(method, "outputs of the present weights")
        own, index, rows = gather_columns(method, batches, columns)
        if len(index) == 0:
            raise ValueError(
                "no training sample is left, so there is nothing to solve. To forget all training samples, train with "
                "method=mixed_privacy, whose user weights are then set to zero"
            )
        initial, self.image = torch.split(rows["outputs"], outputs, 1)
        shard = Shard(torch.searchsorted(index, own), len(index), current_reducer())
        self.table = TrainingTable(index, rows["label"], initial, own, shard)
        self.problem, self.metric = self.table.problem(method), Metric(method.penalty_weights())
        self.units = 3.0 if moves else 1.0

    @property
    def count(self) -> float:
        """Work so far, in passes of training steps."""
        return self.units / _STEP

    def push(self, direction: Mapping[str, Tensor], description: str = "outputs") -> Tensor:
        """Apply J.

        Args:
            direction: By parameter name.
            description: For the progress bar.

        Returns:
            Rows of all samples (n, C).
        """
        self.units += 3
        sweep = PushSweep(self.method.linearized, direction)
        for batch in training_batches(self.method, description):
            sweep.take(batch.input)
        return self.table.shard.spread(sweep.result(self.problem.outputs))

    def pull(self, *sides: Tensor, description: str = "gradient") -> list[Tensors]:
        """Apply the transpose of J.

        Args:
            *sides: Right-hand sides (n, C), which share one evaluation.
            description: For the progress bar.

        Returns:
            By parameter name, the intercept left out, for every side.
        """
        self.units += 1 + 2 * len(sides)
        shard = self.table.shard
        sweep = PullSweep(self.method.linearized, *(shard.own(side) for side in sides))
        for batch in training_batches(self.method, description):
            sweep.take(batch.input)
        names = self.metric.weights
        return [{n: shard.reducer.sum_(entry) for n, entry in found.items() if n in names} for found in sweep.result()]

    def measure(
        self,
        movement: Tensors,
        image: Tensor,
        *,
        reference: float | None,
        precondition: Precondition | None = None,
    ) -> ConjugateGradient:
        """Compute the gradient at a movement from its outputs.

        Args:
            movement: dw by parameter name.
            image: `J dw` (n, C), from scratch.
            reference: Length of the gradient at zero; None: computed in the same pass; not a number: unknown, and the
                relative gradient of the result is that to this movement.
            precondition: For steps that follow.

        Returns:
            The movement as a point of conjugate gradients.
        """
        descent = ConjugateGradient(self.problem, movement, metric=self.metric, precondition=precondition, image=image)
        moves = any(bool(entry.any()) for entry in movement.values())
        sides = [descent.residual] + ([self.start().residual] if reference is None and moves else [])
        pulled, *at_zero = self.pull(*sides)
        if reference is not None or at_zero:
            descent.reference = self.length(at_zero[0]) if reference is None else reference
        descent.receive_gradient(pulled)
        return descent

    def length(self, gradient: Tensors) -> float:
        """The length of a gradient, in the norm of the inverse metric.

        Args:
            gradient: By parameter name.

        Returns:
            Its length.
        """
        return math.sqrt(self.metric.squared_norm(self.metric.solve(gradient)))

    def start(self) -> ConjugateGradient:
        """The pre-trained weights, without a gradient.

        Returns:
            The point.
        """
        deltas = self.method.linearized.deltas
        zeros = {name: torch.zeros_like(deltas[name]) for name in self.metric.weights}
        return ConjugateGradient(self.problem, zeros, metric=self.metric)


class _Outputs:
    # f0 and J dw of a batch, side by side.
    def __init__(self, method: LQF, movement: Mapping[str, Tensor]) -> None:
        self.method, self.movement = method, movement
        self.moves = any(bool(entry.any()) for entry in movement.values())
        self._jacobian: FoldedJacobian | None = None
        self._tangents: Tensors = {}

    def __call__(self, batch: Batch) -> Tensor:
        images = batch.input
        with exactly(images.device, False):
            if not self.moves:
                value = self.method.linearized.folded(images).value(images)
                return torch.cat([value, torch.zeros_like(value)], 1)
            if self._jacobian is None:  # directions are folded once for all batches
                self._jacobian = FoldedJacobian(self.method.linearized, images)
                (self._tangents,) = self._jacobian.fold([self.movement])
            return torch.cat(self._jacobian.value_and_push(images, self._tangents), 1)
