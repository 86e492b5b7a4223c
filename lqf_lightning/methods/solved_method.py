"""A linearized method whose movement of the weights a solver finds."""

from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.methods.linearized_method import LinearizedMethod
from lqf_lightning.methods.logit_matching import LogitMatching
from lqf_lightning.methods.lqf_refusals import refuse_other_solver, refuse_strategy, refuse_weight_decay
from lqf_lightning.methods.matching_refusals import refuse_reference
from lqf_lightning.methods.solvers import Solver, choose_solver

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF


class SolvedMethod(LinearizedMethod):
    """Calls its solver at the moments that Lightning calls the method.

    Attributes:
        solver: What finds dw; chosen anew at the start of a fit if the option `solver` is "auto".
        stored_solver: Option `solver` of the checkpoint that a fit goes on from.
        matching: The reference, if there is one.
    """

    solver: Solver
    stored_solver: str | None = None
    matching: LogitMatching | None = None

    def use(self, solver: Solver) -> None:
        """Leave dw to a solver.

        Args:
            solver: Serves this method.
        """
        self.solver = solver
        self.sweeps, self.automatic_optimization = solver.sweeps, solver.sweeps == 0

    def configure_optimizers(self) -> Any:
        """One parameter group per linearized layer group; exact solvers bring their own steps.

        Returns:
            What Lightning expects.
        """
        if self.sweeps:
            return torch.optim.SGD(self.linearized.deltas.values(), lr=1.0)
        configured = super().configure_optimizers()
        refuse_weight_decay(configured["optimizer"] if isinstance(configured, dict) else configured)
        return configured

    def setup(self, stage: str) -> None:
        """Choose the training batches, and refuse what the solver cannot work with.

        Args:
            stage: "fit", or another.
        """
        if stage == "fit" and self.hparams["solver"] == "auto":
            self.use(choose_solver(cast("LQF", self)))
        super().setup(stage)
        if stage == "fit":
            refuse_strategy(self.trainer.strategy)
            refuse_reference(self.hparams, self.matching, cast(Any, self.trainer).datamodule)
            self.solver.check()

    def on_fit_start(self) -> None:
        """Prepare the reference and the solver."""
        stored, self.stored_solver = self.stored_solver, None
        refuse_other_solver(stored, self.hparams["solver"])
        if self.matching is not None:
            self.matching.start()
        self.solver.start()

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor] | None:  # type: ignore[override]
        """One stochastic step, or one batch of a sweep.

        Args:
            batch: Samples of this rank.
            batch_idx: Number of the batch in the epoch.

        Returns:
            Loss and outputs; nothing in a sweep that does not know them yet.
        """
        if self.hparams["ridge"] == "auto":
            self.log("train/ridge", self.ridge, on_step=False, on_epoch=True, sync_dist=True, batch_size=1)
        return self.solver.step(batch, batch_idx) if self.sweeps else super().training_step(batch, batch_idx)

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Let the solver change the gradients.

        Args:
            optimizer: Unused.
        """
        self.solver.before_optimizer_step()

    def on_train_epoch_end(self) -> None:
        """Stop a run that diverges, or that has arrived."""
        super().on_train_epoch_end()
        self.solver.end_epoch()

    def on_train_end(self) -> None:
        """Say how far it is to the optimum, where that is known."""
        self.solver.finish()
