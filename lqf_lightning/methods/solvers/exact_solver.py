"""What solvers that sweep over fixed training samples have in common."""

from collections.abc import Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import Certificate
from lqf_lightning.methods.solvers.solver import Solver
from lqf_lightning.methods.solvers.training_table import TrainingTable

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

_PRECISIONS = ("32-true", "64-true")


class ExactSolver(Solver):
    """Sweeps instead of ordinary epochs, one step of the optimizer each, and a certificate that is logged.

    Args:
        method: The method that is trained.

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

    def check(self) -> None:
        """Refuse a trainer that leaves samples out or rounds products.

        Raises:
            ValueError: It does.
        """
        self.data_module()
        trainer = self.method.trainer
        limit = trainer.limit_train_batches
        if isinstance(limit, int) or limit != 1.0:  # 1 is one batch, 1.0 all
            raise ValueError(
                f"solver={self.method.hparams['solver']} goes through all training samples, but the trainer takes "
                f"limit_train_batches={limit}. Set trainer.limit_train_batches=1.0, without "
                "trainer.overfit_batches and trainer.fast_dev_run; for fewer samples, set data.subset_ratio"
            )
        if trainer.precision not in _PRECISIONS:
            raise ValueError(
                f"solver={self.method.hparams['solver']} certifies its result, which takes one of the precisions "
                f"{_PRECISIONS}, got {trainer.precision!r}. Set trainer.precision=32-true"
            )

    def start(self) -> None:
        """Collect the training samples.

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
        optimizer.step()  # type: ignore[union-attr]
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
        # Equal on all ranks: the mean over them changes nothing, and silences Lightning's advice.
        note = partial(self.method.log, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        note("train/relative_gradient", certificate.relative_gradient, prog_bar=True)
        note("train/distance_bound", certificate.distance_bound)
        note("train/objective", certificate.objective)
