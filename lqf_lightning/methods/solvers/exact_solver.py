"""What solvers that sweep over fixed training samples have in common."""

import logging
import math
from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import Certificate, ConjugateGradient, Metric
from lqf_lightning.methods.lqf_refusals import refuse_trainer
from lqf_lightning.methods.solvers.solver import Solver
from lqf_lightning.methods.solvers.sweep import PullSweep, PushSweep
from lqf_lightning.methods.solvers.training_table import TrainingTable, training_batches

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)


class ExactSolver(Solver):
    """Sweeps instead of ordinary epochs, one step of the optimizer each, and a certificate that is logged.

    Attributes:
        table: The training samples, from `start` on.
        certificate: How far dw is from the optimum, as of the last complete epoch; None before there is one.
    """

    sweeps = 1

    def __init__(self, method: "LQF") -> None:
        super().__init__(method)
        self.table: TrainingTable
        self.certificate: Certificate | None = None
        self._kept: Mapping[str, Any] = {}
        self._next = 0

    @property
    def most_rows(self) -> int | None:
        """Most samples times classes that the solver is for; None if there is no limit."""
        return None

    def check(self) -> None:
        """Refuse a trainer that leaves samples out or rounds products, and a problem that is too large.

        Raises:
            ValueError: It is.
        """
        method, name = self.method, self.name
        refuse_trainer(method.trainer, name, method.tolerance, next(method.parameters()).dtype == torch.float64)
        data = self.data_module()
        samples, limit = len(data.fixed_train_dataloader().dataset), self.most_rows
        if limit is not None and samples * len(method.classes) > limit:
            raise ValueError(
                f"solver={name} with ridge={method.hparams['ridge']} and acceleration={method.acceleration} is for at "
                f"most {limit} samples times classes, got {samples} x {len(method.classes)} = "
                f"{samples * len(method.classes)}. Set method.solver=cg, method.acceleration=auto and a number for "
                "method.ridge"
            )
        if getattr(getattr(data, "training_transform", None), "random", False) and getattr(data, "copies", 1) == 1:
            log.info("solver=%s sees training images as they are evaluated: data.augmentation plays no part", name)

    def start(self) -> None:
        """Collect the training samples, and what the reference answers on them.

        Raises:
            ValueError: The checkpoint to go on from was written within an epoch.
        """
        if self._kept.get("batch"):
            raise ValueError(
                f"the checkpoint was written within an epoch, before batch {self._kept['batch']}, and a sweep cannot "
                "be resumed halfway. Set ckpt_path to one of the end of an epoch, such as checkpoints/last.ckpt"
            )
        self._next, self.certificate = 0, None
        self.table = TrainingTable.collect(self.method)
        if self.method.matching is not None and self.table.reference is not None:
            self.method.matching.remember(self.table.index, self.table.reference)

    @property
    def batches_per_sweep(self) -> int:
        """Number of batches of one sweep, the same on every rank."""
        return int(self.method.trainer.num_training_batches) // self.sweeps

    def step(self, batch: Batch, number: int) -> dict[str, Tensor] | None:
        """Work on one batch.

        Args:
            batch: Samples of this rank, possibly none.
            number: Of the batch in the epoch.

        Returns:
            What a training step returns, if the outputs on the batch are known.
        """
        self._next = (number + 1) % (self.sweeps * self.batches_per_sweep)
        return self.take(batch, *divmod(number, self.batches_per_sweep))

    def take(self, batch: Batch, sweep: int, position: int) -> dict[str, Tensor] | None:
        """Work on one batch of a sweep.

        Args:
            batch: Samples of this rank, possibly none.
            sweep: Number of the sweep in the epoch.
            position: Number of the batch in the sweep.

        Returns:
            What a training step returns, if the outputs on the batch are known.

        Raises:
            NotImplementedError: The subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `take`")

    def state(self) -> dict[str, Any]:
        """Where in the epoch a checkpoint is written.

        Returns:
            Plain values.
        """
        return {"batch": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Keep a state for `start`.

        Args:
            state: From a checkpoint.
        """
        self._kept = state

    def whole_push(self, direction: Mapping[str, Tensor], description: str) -> Tensor:
        """Apply J in one sweep of its own.

        Args:
            direction: By parameter name.
            description: For the progress bar.

        Returns:
            Rows of all samples (n, C).
        """
        push = PushSweep(self.method.linearized, direction)
        for batch in training_batches(self.method, description):
            push.take(batch.input)
        return self.spread(push)

    def whole_pull(self, descent: ConjugateGradient, description: str) -> list[dict[str, Tensor]]:
        """Apply the transpose of J to the sides of a descent, in one sweep of its own.

        Args:
            descent: Has the sides.
            description: For the progress bar.

        Returns:
            By parameter name, for each side.
        """
        pull = self.pull_sweep(descent)
        for batch in training_batches(self.method, description):
            pull.take(batch.input)
        return self.summed(pull)

    def pull_sweep(self, descent: ConjugateGradient) -> PullSweep:
        """Begin a sweep over this rank's samples.

        Args:
            descent: Has the sides.

        Returns:
            The sweep.
        """
        return PullSweep(self.method.linearized, *(self.table.shard.own(side) for side in descent.sides))

    def spread(self, push: PushSweep) -> Tensor:
        """Bring the rows of all ranks together.

        Args:
            push: A finished sweep.

        Returns:
            Rows of all samples (n, C).
        """
        return self.table.shard.spread(push.result(len(self.method.classes)))

    def summed(self, pull: PullSweep) -> list[dict[str, Tensor]]:
        """Add up what all ranks have pulled.

        Args:
            pull: A finished sweep.

        Returns:
            By parameter name, one for each side.
        """
        reducer = self.table.shard.reducer
        return [{name: reducer.sum_(entry) for name, entry in pulled.items()} for pulled in pull.result()]

    def finish(self) -> None:
        """Say how far the optimum is, and whether that means anything."""
        reached, method = self.certificate, self.method
        if reached is None or not method.trainer.is_global_zero:
            return
        weights = method.penalty_weights()
        moved = {name: delta.detach() for name, delta in method.linearized.deltas.items() if name in weights}
        length = math.sqrt(Metric(weights).squared_norm(moved))
        where = (
            f"a relative gradient of {reached.relative_gradient:.2g}: dw is within {reached.distance_bound:.3g} of the"
        )
        where += f" optimum, its own length is {length:.3g}"
        if reached.relative_gradient > method.tolerance:
            log.warning("stopped above tolerance=%.2g, at %s. Set trainer.max_epochs higher", method.tolerance, where)
        elif method.metric == "identity" and reached.distance_bound > length:
            log.warning(
                "arrived at %s. At this small a ridge (%.2g) the bound says nothing: set method.tolerance lower, or "
                "method.ridge higher", where, method.ridge,
            )  # fmt: skip
        else:
            log.info("arrived at %s", where)

    def place(self, movement: Mapping[str, Tensor], intercept: Tensor) -> None:
        """Write a solution to dw, as one step of the method's optimizer, so that Lightning counts it.

        Args:
            movement: dw by parameter name, the intercept not included.
            intercept: Value of the intercept (C,), if the problem has one.
        """
        method, optimizer = self.method, self.method.optimizers()
        wanted = dict(movement)
        if method.intercept_name is not None:
            wanted[method.intercept_name] = intercept
        deltas = method.linearized.deltas
        for name, delta in deltas.items():
            delta.grad = delta.detach() - wanted[name].to(delta)
        optimizer.step()  # type: ignore[union-attr]  # there is one
        with torch.no_grad():
            for name, delta in deltas.items():
                delta.grad = None
                delta.copy_(wanted[name])  # the rate is 1, but subtracting twice rounds

    def report(self, certificate: Certificate) -> None:
        """Keep and log a certificate.

        Args:
            certificate: That of the solution in dw, the same on every rank.
        """
        self.certificate = certificate
        # Equal on all ranks: sync_dist changes nothing, and silences Lightning's advice.
        note = partial(self.method.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        note("train/relative_gradient", certificate.relative_gradient, prog_bar=True)
        note("train/distance_bound", certificate.distance_bound)
        note("train/objective", certificate.objective)
