"""The exact optimum of a small set, from its kernel."""

import logging
import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import (
    DualFactor,
    Solution,
    assemble_kernel,
    choose_representation,
    current_reducer,
)
from lqf_lightning.methods.solvers.auto_ridge import kernel_scales, penalized_groups, settle_ridge
from lqf_lightning.methods.solvers.exact_solver import ExactSolver
from lqf_lightning.methods.solvers.problem_key import is_same_problem, problem_key
from lqf_lightning.methods.solvers.sweep import PullSweep
from lqf_lightning.methods.solvers.tensor_folder import TensorFolder
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.methods.solvers.training_table import training_batches
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_LIMIT = 20_000  # rows of a kernel
_PATH_LIMIT = 17_500  # whose eigenvectors fit in the memory that a KernelSpectrum allows itself


class KernelSolver(ExactSolver):
    """Assembles the kernel of all training samples and outputs, solves, and writes dw back; the run is one epoch.

    From then on the model is like any other: evaluation, checkpoints and callbacks see its dw.

    Args:
        method: The method that is trained.

    Attributes:
        factor: The solved system, None before `start`.
    """

    def __init__(self, method: "LQF") -> None:
        super().__init__(method)
        self.factor: DualFactor | None = None
        self._solution: Solution
        self._movement: dict[str, Tensor]
        self._key: dict[str, Any] = {}

    def start(self) -> None:
        """Collect, choose the ridge if asked to, solve, and pull the coefficients back to the weights."""
        super().start()
        method = self.method
        kept, self._kept, self._key = self._kept.get("problem", {}), {}, {}
        if is_same_problem(kept, problem_key(method, self.table, "kernel")):
            log.info("the checkpoint holds the solution")
            self._key, method.trainer.should_stop = dict(kept), True
            return
        self._refuse_size()
        kernel = assemble_kernel(
            method.linearized,
            penalized_groups(method),
            TrainingImages(method),
            index=self.table.own_index,
            other_index=self.table.own_index[:0],
            budget=int(method.memory_gib * 2**30),
            limit=_LIMIT,
            reducer=current_reducer(),
            store=TensorFolder(method.kernel_folder) if method.kernel_folder else None,
            watch=lambda items: track(items, "kernel"),
        ).train
        settle_ridge(method, self.table, kernel)
        self.factor = DualFactor(self.table.problem(method), kernel, kernel_scales(method))
        self._solution = self.factor.solution()
        self._movement = self._pull(self._solution.coefficients)

    def _refuse_size(self) -> None:
        samples, outputs = self.table.initial.shape
        parameters = sum(delta.numel() for delta in self.method.linearized.deltas.values())
        choice = choose_representation(samples, outputs, parameters, limit=_LIMIT)
        log.info("%s: %s", choice.name, choice.reason)
        limit = _PATH_LIMIT if math.isnan(self.method.ridge) else _LIMIT
        if samples * outputs > limit:
            raise ValueError(
                f"solver=kernel with ridge={self.method.hparams['ridge']} is for at most {limit} rows, got {samples} "
                f"samples with {outputs} outputs = {samples * outputs}. Set method.solver=cg"
            )

    def _pull(self, coefficients: Tensor | None) -> dict[str, Tensor]:
        method, shard = self.method, self.table.shard
        if coefficients is None:
            raise RuntimeError("the kernel gave no coefficients")
        pull = PullSweep(method.linearized, shard.own(coefficients))
        for batch in training_batches(method, "weights"):
            pull.take(batch.input)
        (pulled,) = pull.result()
        summed = {name: shard.reducer.sum_(entry) for name, entry in pulled.items()}
        return {name: summed[name] / weight for name, weight in method.penalty_weights().items()}

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
            self.place(self._movement, self._solution.intercept)
            self.report(self._solution.certificate)
            self._key = problem_key(self.method, self.table)
        rows = torch.searchsorted(self.table.index, batch.index)
        return self.method.note_training(self._solution.outputs[rows].to(batch.input.dtype), batch.target)

    def end_epoch(self) -> None:
        """Stop: the optimum does not get better."""
        self.method.trainer.should_stop = True

    def state(self) -> dict[str, Any]:
        """The problem that dw solves.

        Returns:
            Tensors and plain values.
        """
        return super().state() | ({"problem": self._key} if self._key else {})
