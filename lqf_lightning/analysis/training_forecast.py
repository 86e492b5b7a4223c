"""A run in function space: its kernel, its steps and its batches, from which its loss follows without training."""

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.analysis.batch_order import batch_order
from lqf_lightning.analysis.linear_twin import linear_twin
from lqf_lightning.analysis.optimizer_steps import OptimizerSteps, StepGroup, optimizer_steps
from lqf_lightning.data import Batch
from lqf_lightning.data.loader import TrainingLoader
from lqf_lightning.data.sampler import TrainingSampler
from lqf_lightning.linear import Kernel, StreamedJacobian, assemble_kernel, current_reducer
from lqf_lightning.linear.output_loss import CrossEntropyOutputLoss, OutputLoss, SquaredOutputLoss
from lqf_lightning.linear.training_curve import TrainingCurve, TrainingGroup, training_curve
from lqf_lightning.linear.training_rule import TrainingRule
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.solvers.sample_columns import Column, gather_columns
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.methods.solvers.training_table import TrainingTable, training_batches
from lqf_lightning.progress import track

ForecastKernel = Literal["auto", "full", "trace"]
LIMIT = 20_000  # rows of a kernel


@dataclass(frozen=True)
class TrainingForecast:
    """What is needed to foretell a run, the same on every rank.

    Attributes:
        initial: Outputs before training (n, C), samples by ascending index.
        loss: Of the outputs.
        kernel: Inner products, by parameters that are trained alike.
        groups: How these are trained.
        rule: Learning rates and momentum.
        sampler: The order of the samples.
        places: Row of the sample at every position of the sampler (n,).
        epoch: Steps per epoch.
        seconds: What collecting all this has taken.
    """

    initial: Tensor
    loss: OutputLoss
    kernel: Kernel
    groups: dict[str, TrainingGroup]
    rule: TrainingRule
    sampler: TrainingSampler
    places: Tensor
    epoch: int
    seconds: float

    @property
    def exact(self) -> bool:
        """Whether the kernel is that of the network's expansion, and no surrogate."""
        return self.kernel.form == "full"

    def curve(self) -> TrainingCurve:
        """Train in function space, on the very batches of the run.

        Returns:
            Loss and error at every step.
        """
        return training_curve(
            self.kernel, self.initial, self.loss, self.rule, groups=self.groups, batches=self._batches()
        )

    def _batches(self) -> Iterator[Tensor]:
        for positions in batch_order(self.sampler, self.epoch):
            yield self.places[positions]

    def half(self) -> "TrainingForecast":
        """The same training of a random half of the samples.

        Returns:
            The forecast, at the same learning rates; its epochs are shorter.

        Raises:
            ValueError: There are fewer than two samples.
        """
        samples = len(self.initial)
        if samples < 2:
            raise ValueError(f"half of {samples} samples are none. Set max_samples=200")
        rows = torch.randperm(samples, generator=torch.Generator().manual_seed(0))[: samples // 2].sort().values
        rows = rows.to(self.places)
        size = min(self.sampler.batch_size * self.sampler.world_size, len(rows))
        sampler = TrainingSampler(len(rows), self.sampler.seed, batch_size=size, drop_last=self.sampler.drop_last)
        return replace(
            self,
            initial=self.initial[rows],
            loss=_part_of_loss(self.loss, rows),
            kernel=_part_of_kernel(self.kernel, rows),
            groups={n: replace(g, origin=None if g.origin is None else g.origin[rows]) for n, g in self.groups.items()},
            sampler=sampler,
            places=torch.arange(len(rows), device=rows.device),
            epoch=max(1, len(sampler) // size if sampler.drop_last else -(-len(rows) // size)),
        )


def forecast_training(
    method: Method, *, form: ForecastKernel = "auto", largest: int = 8000, memory_gib: float = 4.0
) -> TrainingForecast:
    r"""Collect what is needed to foretell a run that is about to begin; all ranks have to call this together.

    The kernel of the network's expansion at the pre-trained weights is assembled by parameters that are trained alike,
    for the images as they are evaluated: of augmentation, dropout and changing batch statistics a forecast knows
    nothing. For `lqf` it is exact without them; for fine-tuning it is that of the linearized network.

    Args:
        method: The method, attached to a trainer with its optimizer, before the first step.
        form: Of the kernel: "full", or "trace" (a surrogate that leaves couplings of outputs out); "auto": full up to
            `largest` samples times outputs.
        largest: See there.
        memory_gib: Memory for what the kernel is assembled from, in GiB.

    Returns:
        The forecast.
    """
    started = time.monotonic()
    steps = optimizer_steps(method)
    # Training shall not miss a random number.
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):
        twin = method if isinstance(method, LQF) else linear_twin(method)
        table = TrainingTable.collect(twin)
        kernel = _assemble(twin, table, steps.groups, _choose(form, table, largest), memory_gib)
        groups = _training_groups(twin, steps)
    sampler, places, epoch = _order(method, table.index)
    loss = _loss(method, table)
    seconds = time.monotonic() - started
    return TrainingForecast(table.initial, loss, kernel, groups, steps.rule, sampler, places, epoch, seconds)


def _choose(form: ForecastKernel, table: TrainingTable, largest: int) -> Literal["full", "trace"]:
    samples, outputs = table.initial.shape
    chosen: Literal["full", "trace"] = ("full" if samples * outputs <= largest else "trace") if form == "auto" else form
    rows = samples * (outputs if chosen == "full" else 1)
    if rows > LIMIT:
        cheaper = "callbacks.training_time.kernel=trace, or " if chosen == "full" else ""
        raise ValueError(
            f"a {chosen} kernel of {samples} samples and {outputs} outputs has {rows} rows, the limit is {LIMIT}. Set "
            f"{cheaper}data.subset_ratio={0.9 * LIMIT / rows:.2g}, or let lqf-predict work with a subset"
        )
    return chosen


def _assemble(
    twin: LQF, table: TrainingTable, groups: tuple[StepGroup, ...], form: Literal["full", "trace"], memory_gib: float
) -> Kernel:
    return assemble_kernel(
        twin.linearized,
        {_name(group): group.names for group in groups},
        TrainingImages(twin),
        form=form,
        index=table.own_index,
        other_index=table.own_index[:0],
        budget=int(memory_gib * 2**30),
        limit=LIMIT,
        reducer=current_reducer(),
        watch=lambda items: track(items, "kernel for the training time"),
    ).train


def _training_groups(twin: LQF, steps: OptimizerSteps) -> dict[str, TrainingGroup]:
    weights = dict(twin.linearized.model.named_parameters())
    found = {}
    for group in steps.groups:
        origin = None
        if group.decay and not steps.centered:
            origin = _pushed(twin, {name: weights[name].detach() for name in group.names})
        found[_name(group)] = TrainingGroup(group.factor, group.decay, origin)
    return found


def _name(group: StepGroup) -> str:
    return f"rate x {group.factor:.6g}, decay {group.decay:.6g}"


def _pushed(twin: LQF, direction: dict[str, Tensor]) -> Tensor:
    def push(batch: Batch) -> Tensor:
        return StreamedJacobian(twin.linearized, [batch.input]).push(direction)[0]

    columns = {"moved": Column(push, len(twin.classes))}
    return gather_columns(twin, training_batches(twin, "weight decay"), columns)[2]["moved"]


def _order(method: Method, index: Tensor) -> tuple[TrainingSampler, Tensor, int]:
    loader = method.trainer.train_dataloader
    if not isinstance(loader, TrainingLoader) or not isinstance(loader.order, TrainingSampler):
        raise TypeError(
            f"the order of training samples must be known, as in an ImageDataModule; got {type(loader).__name__}. "
            "Leave the callback training_time out"
        )
    records = cast(Any, loader.dataset).records
    known = torch.tensor([record.index for record in records], dtype=torch.int64, device=index.device)
    return loader.order, torch.searchsorted(index, known), int(method.trainer.num_training_batches)


def _loss(method: Method, table: TrainingTable) -> OutputLoss:
    options, every = method.hparams, getattr(cast(Any, method.trainer).datamodule, "sample_weights", None)
    weight = None if every is None else every.to(table.initial)[table.index]
    if options["loss"] == "cross_entropy":
        return CrossEntropyOutputLoss(table.label, weight)
    target = float(options["target_scale"]) * one_hot(table.label, table.initial.shape[1]).to(table.initial)
    return SquaredOutputLoss(target, weight)


def _part_of_loss(loss: OutputLoss, rows: Tensor) -> OutputLoss:
    weight = getattr(loss, "weight", None)
    weight = None if weight is None else weight[rows]
    if isinstance(loss, SquaredOutputLoss):
        return SquaredOutputLoss(loss.target[rows], weight)
    return CrossEntropyOutputLoss(loss.label[rows], weight)


def _part_of_kernel(kernel: Kernel, rows: Tensor) -> Kernel:
    places = (rows[:, None] * kernel.coupled + torch.arange(kernel.coupled, device=rows.device)).flatten()
    groups = {name: matrix[:, places][:, :, places] for name, matrix in kernel.groups.items()}
    return Kernel(groups, kernel.outputs, kernel.form)
