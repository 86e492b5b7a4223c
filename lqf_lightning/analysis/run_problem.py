"""The linear-quadratic problem of a run, with its kernel: what every analysis of its samples starts from."""

import logging
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from lqf_lightning.analysis.linear_twin import linear_twin
from lqf_lightning.backbones import Backbone
from lqf_lightning.data import Batch
from lqf_lightning.linear import (
    DualFactor,
    Kernel,
    KernelSpectrum,
    QuadraticProblem,
    assemble_kernel,
    current_reducer,
)
from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.solvers.auto_ridge import kernel_scales, merged_groups, penalized_groups
from lqf_lightning.methods.solvers.sample_columns import Column, gather_columns, output_at_start
from lqf_lightning.methods.solvers.settle_penalty import settle_penalty
from lqf_lightning.methods.solvers.tensor_folder import TensorFolder
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.methods.solvers.training_table import TrainingTable, fixed_batches
from lqf_lightning.progress import track

log = logging.getLogger(__name__)
KernelChoice = Literal["auto", "full", "trace", "last_layer"]
LIMIT = 20_000  # rows of a kernel
APART = 8_000  # rows up to which layer groups have kernels of their own, of 0.25 GiB each at most


@dataclass(frozen=True)
class HeldOut:
    """Validation samples by ascending index, the same on every rank.

    Attributes:
        index: Index of every sample (m,).
        label: Class position (m,).
        initial: Output at the pre-trained weights (m, C).
    """

    index: Tensor
    label: Tensor
    initial: Tensor


@dataclass(frozen=True)
class RunProblem:
    """A run as a linear-quadratic problem, the same on every rank.

    Attributes:
        method: The linear method: that of the run, or the twin of a fine-tuning run.
        table: Index, label and initial output of all training samples.
        kernel: Inner products among them, by layer group.
        scales: What the groups are multiplied with.
        problem: What is minimized, its ridge settled.
        validation: Held-out samples, None if there are none or they were not asked for.
        cross: Kernel of these with the training samples.
        twin: Whether this is the twin of a fine-tuning run: a model of the run, and not what it minimizes.
    """

    method: LQF
    table: TrainingTable
    kernel: Kernel
    scales: dict[str, float]
    problem: QuadraticProblem
    validation: HeldOut | None = None
    cross: Kernel | None = None
    twin: bool = False

    @property
    def exact(self) -> bool:
        """Whether the kernel is that of the model itself, and no surrogate."""
        if self.kernel.form == "last_layer":  # which leaves out a bias that is a weight like the others
            return set(self.method.penalty_weights()) == {f"{self.method.backbone.head}.weight"}
        return self.kernel.form == "full"

    def factor(self) -> DualFactor:
        """Factor the problem.

        Returns:
            The factorization.
        """
        return DualFactor(self.problem, self.kernel, self.scales)

    def penalized(self, share: float) -> "RunProblem":
        """The same problem with another ridge.

        Args:
            share: The ridge as a share of the mean inner product of a sample's Jacobian row with itself.

        Returns:
            A problem with the same kernel.
        """
        total = sum(scale * self.kernel.groups[group].double() for group, scale in self.scales.items())
        level = float(torch.as_tensor(total).diagonal(dim1=1, dim2=2).mean())
        return replace(self, problem=self.problem.with_(ridge=max(share * level, 1e-300)))

    def nearly_free(self) -> "RunProblem":
        """The same problem with a ridge too small to matter, for trainings that time stops.

        Returns:
            A problem with the same kernel.
        """
        return self.penalized(1e-9)

    def spectrum(self) -> KernelSpectrum:
        """Decompose the kernel.

        Returns:
            Its eigenvectors.
        """
        return KernelSpectrum(self.problem, self.kernel, self.scales)


def problem_of_run(
    method: Method,
    *,
    form: KernelChoice = "auto",
    combinations: int | None = None,
    largest: int = LIMIT,
    memory_gib: float = 4.0,
    chunk_size: int | None = None,
    folder: str | Path | None = None,
    validation: bool = True,
    start: Backbone | None = None,
    settle: bool = True,
    intercept: bool = True,
) -> RunProblem:
    """Assemble the problem of a run; all ranks have to call this together.

    Args:
        method: The method, attached to a trainer with an `ImageDataModule`.
        form: Of the kernel: "full" (exact), "trace" or "last_layer" (surrogates that rank samples); "auto": full up to
            `largest` samples times outputs, else trace.
        combinations: For a trace, random combinations of outputs that stand for all; None: all outputs.
        largest: Most samples times outputs that "auto" takes the full kernel for.
        memory_gib: Memory for what a kernel is assembled from, in GiB; less takes more passes.
        chunk_size: Images per pass of this rank; None: those of an evaluation batch.
        folder: Keeps finished parts of the kernel, so that an interrupted assembly goes on.
        validation: Whether validation samples take part.
        start: The network of a fine-tuning run before training; None: as it is now.
        settle: Whether a ridge that is not given is chosen by leave-one-out; otherwise it is 1, to be replaced.
        intercept: Of a fine-tuning run, see `linear_twin`.

    Returns:
        The problem.

    Refusals are those of `linear_twin` and `assemble_kernel`, and of too many samples for a kernel of this form.
    """
    with torch.inference_mode(False), torch.random.fork_rng(devices=[]):  # training shall not miss a number
        twin = linear_twin(method, start, intercept=intercept)
        table = TrainingTable.collect(twin)
        chosen = _choose(form, table, largest)
        if settle and twin.metric == "learned" and chosen != "full":
            settle_penalty(twin, table)  # by a surrogate, which sets some tensors apart
        groups, scales = _groups(twin, chosen, _rows(chosen, table))
        loader: Any = twin.solver.data_module().val_dataloader() if validation else []
        held_out, own = _held_out(twin, loader) if len(loader) else (None, table.own_index[:0])
        pair = assemble_kernel(
            twin.linearized,
            groups,
            _Chunks(TrainingImages(twin), chunk_size),
            _Chunks(TrainingImages(twin, loader), chunk_size) if held_out is not None else (),
            form=chosen,
            combinations=combinations if chosen == "trace" else None,
            index=table.own_index,
            other_index=own,
            budget=int(memory_gib * 2**30),
            limit=LIMIT,
            reducer=current_reducer(),
            store=None if folder is None else TensorFolder(folder),
            watch=lambda items: track(items, f"{chosen} kernel of samples"),
        )
        if settle:
            settle_penalty(twin, table, pair.train, scales)
            if groups.keys() <= twin.penalty_groups.keys():  # some factors are known only now
                scales = {group: 1.0 / twin.group_ridge.get(group, 1.0) for group in groups}
    problem = table.problem(twin, None if settle else 1.0)
    return RunProblem(twin, table, pair.train, scales, problem, held_out, pair.cross, twin is not method)


class _Chunks:
    # Batches cut into pieces that fit into memory with what is kept of every layer.
    def __init__(self, images: TrainingImages, size: int | None) -> None:
        self.images, self.size = images, size

    def __len__(self) -> int:
        return len(self.images)

    def __iter__(self) -> Iterator[Tensor]:
        for batch in self.images:
            yield from torch.split(batch, self.size or len(batch))


def _choose(form: KernelChoice, table: TrainingTable, largest: int) -> KernelForm:
    samples, outputs = table.initial.shape
    chosen: KernelForm = ("full" if samples * outputs <= largest else "trace") if form == "auto" else form
    if (rows := _rows(chosen, table)) > LIMIT:
        cheaper = "callbacks.sample_information.kernel=trace, or " if chosen == "full" else ""
        raise ValueError(
            f"a {chosen} kernel of {samples} samples and {outputs} outputs has {rows} rows, the limit is {LIMIT}. Set "
            f"{cheaper}data.subset_ratio={0.9 * LIMIT / rows:.2g}"
        )
    log.info("%s kernel of %d samples and %d outputs", chosen, samples, outputs)
    return chosen


def _rows(form: KernelForm, table: TrainingTable) -> int:
    samples, outputs = table.initial.shape
    return samples * (outputs if form == "full" else 1)


def _groups(twin: LQF, form: KernelForm, rows: int) -> tuple[dict[str, list[str]], dict[str, float]]:
    if form != "last_layer":
        # Apart, layer groups are kept one by one, so that a killed assembly goes on; together they take less memory.
        apart = rows <= APART or (twin.metric == "learned" and math.isnan(twin.ridge))
        return (penalized_groups(twin), kernel_scales(twin)) if apart else merged_groups(twin)
    weight = f"{twin.backbone.head}.weight"
    if weight not in twin.penalty_weights():
        raise ValueError("the last layer is not linearized. Set callbacks.sample_information.kernel=trace")
    return {"head": [weight]}, {"head": 1.0 / twin.group_ridge.get("head", 1.0)}


def _held_out(twin: LQF, loader: DataLoader[Batch]) -> tuple[HeldOut, Tensor]:
    columns = {"label": Column.labels(), "initial": Column(partial(output_at_start, twin), len(twin.classes))}
    own, index, rows = gather_columns(twin, fixed_batches(twin, loader, "validation samples"), columns)
    return HeldOut(index, rows["label"], rows["initial"]), own
