"""The exact optimum of a small set, from its kernel."""

import logging
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import (
    CoefficientDescent,
    DualFactor,
    DualPrecondition,
    Metric,
    QuadraticProblem,
    assemble_kernel,
    choose_representation,
    current_reducer,
)
from lqf_lightning.methods.solvers.auto_ridge import kernel_scales, merged_groups, penalized_groups
from lqf_lightning.methods.solvers.compare_strengths import compare_strengths
from lqf_lightning.methods.solvers.exact_solver import ExactSolver
from lqf_lightning.methods.solvers.problem_key import is_same_problem, problem_key
from lqf_lightning.methods.solvers.relinearize import arrive
from lqf_lightning.methods.solvers.settle_penalty import settle_penalty
from lqf_lightning.methods.solvers.tensor_folder import TensorFolder
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.methods.solvers.validation_table import ValidationTable
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_LIMIT = 20_000  # rows of a kernel
_STEPS, _ENOUGH = 4, 1e-6  # steps that make up for the kernel's rounding, and the relative gradient that will do
_KEPT = 4  # groups of different ridges that are kept one by one
_APART = 2  # times `memory_gib` may be taken by kernels that are kept apart
_PATH_LIMIT = 17_500  # whose eigenvectors fit in the memory that a KernelSpectrum allows itself


class KernelSolver(ExactSolver):
    """Assembles the kernel of all training samples and outputs, solves, and writes dw back; the run is one epoch.

    From then on the model is like any other: evaluation, checkpoints and callbacks see its dw.

    Args:
        method: The method that is trained.

    Attributes:
        factor: The solved system of the stored kernel, None before `start`.
        descent: Solution and certificate, from the model itself.
    """

    name = "kernel"

    def __init__(self, method: "LQF") -> None:
        super().__init__(method)
        self.factor: DualFactor | None = None
        self.descent: CoefficientDescent
        self._key: dict[str, Any] = {}

    def start(self) -> None:
        """Collect, choose the ridge if asked to, solve, and pull the coefficients back to the weights."""
        super().start()
        method = self.method
        kept, self._kept, self._key = self._kept.get("problem", {}), {}, {}
        if method.expansions >= method.relinearize and is_same_problem(kept, self._problem_key()):
            log.info("the checkpoint holds the solution")
            self._key, method.trainer.should_stop = dict(kept), True
            return
        learned = method.metric == "learned"  # groups keep their names, by which parts are found again
        apart = learned and math.isnan(method.ridge)
        groups, scales = (penalized_groups(method), kernel_scales(method)) if learned else merged_groups(method)
        if apart:
            self._refuse_memory(len(groups))
        add_up = not apart and len(groups) > _KEPT  # learned factors are all different
        self._tell_size(1 if add_up else len(groups))
        watched = self._watched()
        pair = assemble_kernel(
            method.linearized,
            groups,
            TrainingImages(method),
            () if watched is None else TrainingImages(method, watched.loader),
            index=self.table.own_index,
            other_index=self.table.own_index[:0] if watched is None else watched.own_index,
            budget=int(method.memory_gib * 2**30),
            limit=_LIMIT,
            reducer=current_reducer(),
            scales=scales if add_up else None,
            store=self._store(),
            watch=lambda items: track(items, "kernel"),
        )
        kernel = pair.train
        settle_penalty(method, self.table, kernel, scales)
        factors = kernel_scales(method) if apart else None if add_up else scales
        if watched is not None and pair.cross is not None:
            method.tradeoff_curve = compare_strengths(method, self.table, watched, (kernel, pair.cross), factors)
        problem = self.table.problem(method)
        inverse = DualPrecondition(problem, kernel, factors)
        self.factor = inverse.factor
        self.descent = self._descend(problem, inverse)

    def _store(self) -> TensorFolder | None:
        method = self.method
        if not method.kernel_folder:
            return None
        folder = Path(method.kernel_folder)  # every expansion has a kernel of its own
        return TensorFolder(folder / f"expansion{method.expansions}" if method.expansions else folder)

    def _watched(self) -> ValidationTable | None:
        matching = self.method.matching
        return None if matching is None or matching.tradeoff is None else ValidationTable.collect(self.method, matching)

    def _descend(self, problem: QuadraticProblem, inverse: DualPrecondition) -> CoefficientDescent:
        # The kernel is rounded. With the factor as a preconditioner a step or two of conjugate gradients reach the
        # optimum of the model itself, and its true gradient is known.
        weights = self.method.penalty_weights()
        start = {name: torch.zeros_like(self.method.linearized.deltas[name]) for name in weights}
        descent = CoefficientDescent(problem, start, inverse, metric=Metric(weights))
        descent.receive_sides(*self.whole_pull(descent, "weights"))
        before = math.inf
        for _ in range(_STEPS):
            now = descent.certificate.relative_gradient
            if now <= _ENOUGH or now > before / 2:  # good enough, or as good as rounding allows
                break
            before = now
            descent.receive_image(self.whole_push(descent.direction, "outputs"))
            descent.receive_sides(*self.whole_pull(descent, "certificate"))
        return descent

    @property
    def most_rows(self) -> int:
        """Most samples times classes: fewer if a ridge or strengths are compared, which may take eigenvectors."""
        options = self.method.hparams
        return _PATH_LIMIT if options["ridge"] == "auto" or options["tradeoff"] is not None else _LIMIT

    def check(self) -> None:
        """Refuse what `ExactSolver` refuses, and a validation set that is too large to compare strengths on.

        Raises:
            ValueError: It is.
        """
        super().check()
        method = self.method
        if method.hparams["tradeoff"] is None:
            return
        samples = len(self.data_module().val_dataloader().dataset)
        if samples * len(method.classes) > _LIMIT:
            raise ValueError(
                f"tradeoff is for at most {_LIMIT} validation samples times classes, got {samples} x "
                f"{len(method.classes)} = {samples * len(method.classes)}. Set data.val_fraction lower, or "
                "method.tradeoff=null"
            )

    def _refuse_memory(self, groups: int) -> None:
        rows = self.table.initial.numel()
        needed = 4 * groups * rows**2 / 2**30
        if needed > _APART * self.method.memory_gib:
            raise ValueError(
                f"to learn its penalty exactly, a kernel of {rows} rows is kept apart for {groups} groups: "
                f"{needed:.3g} GiB, the limit is {_APART} x memory_gib={self.method.memory_gib}. Set method.solver=cg "
                f"(which learns on a trace kernel), method.metric=identity, or method.memory_gib={needed / _APART:.2g}"
            )

    def _tell_size(self, groups: int) -> None:
        samples, outputs = self.table.initial.shape
        parameters = sum(delta.numel() for delta in self.method.linearized.deltas.values())
        log.info(choose_representation(samples, outputs, parameters, groups=groups, limit=_LIMIT).reason)

    def take(self, batch: Batch, sweep: int, position: int) -> dict[str, Tensor]:
        """Note the outputs of the solution, and write it back with the last batch.

        Args:
            batch: Samples of this rank, possibly none.
            sweep: Unused, there is one.
            position: Number of the batch.

        Returns:
            Loss and outputs.
        """
        if position + 1 == self.batches_per_sweep:
            self.place(self.descent.movement, self.descent.intercept)
            self.report(self.descent.certificate)
            self._key = self._problem_key()
        rows = torch.searchsorted(self.table.index, batch.index)
        return self.method.note_training(self.descent.outputs[rows].to(batch.input.dtype), batch)

    def _problem_key(self) -> dict[str, Any]:
        return problem_key(self.method, self.table, "kernel", Metric(self.method.penalty_weights()))

    def end_epoch(self) -> None:
        """Stop, as the optimum does not get better, or go on around it."""
        arrive(self.method, self.start)

    def state(self) -> dict[str, Any]:
        """The problem that dw solves.

        Returns:
            Tensors and plain values.
        """
        return super().state() | ({"problem": self._key} if self._key else {})
