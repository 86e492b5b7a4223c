"""Stochastic gradient steps on the linear-quadratic problem, preconditioned at the pre-trained weights."""

import logging
import math
from typing import TYPE_CHECKING

from lqf_lightning.linear import KFAC, current_reducer, top_curvature
from lqf_lightning.methods.solvers.auto_ridge import settle_ridge
from lqf_lightning.methods.solvers.curvature_samples import curvature_samples, fit_preconditioner
from lqf_lightning.methods.solvers.solver import Solver
from lqf_lightning.methods.solvers.training_table import TrainingTable, training_batches

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_MEASURED = 128  # samples that the top curvature is measured on, in batches
_MOST_BATCHES = 8
_HOPELESS = 10.0  # times the loss of predicting nothing


class StochasticDescent(Solver):
    """The paper's way: batches, augmentation, a schedule, and Kronecker factors fitted once.

    Args:
        method: The method that is trained.

    Attributes:
        kfac: The preconditioner, if there is one.
        top_curvature: What directions are divided by.
    """

    name = "sgd"

    def __init__(self, method: "LQF") -> None:
        super().__init__(method)
        self.kfac: KFAC | None = None
        self.top_curvature = 1.0

    def start(self) -> None:
        """Fit the preconditioner and measure the step at w0; nothing that training changes enters them."""
        method = self.method
        if math.isnan(method.ridge):
            settle_ridge(method, TrainingTable.collect(method))
        elif method.matching is not None:
            method.matching.settle_scale_by(training_batches(method, "outputs of the reference"))
        self.kfac = fit_preconditioner(method)
        if method.normalize_step:
            # Measured without sample weights, some of which depend on the augmentation: the largest bounds them all.
            heaviest = method.heaviest_sample if method.matching is None else method.matching.heaviest
            self.top_curvature = heaviest * self._measure_top_curvature()
            log.info("learning rates are divided by the top curvature of a batch, %.4g", self.top_curvature)

    def _measure_top_curvature(self) -> float:
        # Small batches differ more among themselves: several are measured, and the steepest counts.
        method = self.method
        data = self.data_module()
        size, samples = data.batch_size, len(data.fixed_train_dataloader().dataset)
        return max(
            top_curvature(
                method.linearized,
                list(curvature_samples(method, size, start=number * size)),
                ridge=method.ridge,
                precondition=self.kfac.precondition if self.kfac else dict,
                reducer=current_reducer(),
            )
            for number in range(max(1, min(_MEASURED // size, _MOST_BATCHES, samples // size)))
        )

    def before_optimizer_step(self) -> None:
        """Precondition and scale the gradient, which holds the penalty's by now."""
        deltas = self.method.linearized.deltas
        gradients = {n: d.detach() * 0 if d.grad is None else d.grad for n, d in deltas.items()}
        directions = self.kfac.precondition(gradients) if self.kfac else gradients
        for name, direction in directions.items():
            deltas[name].grad = direction / self.top_curvature

    def end_epoch(self) -> None:
        """Stop a run that gets worse than predicting nothing, on all ranks alike.

        Raises:
            FloatingPointError: The loss is beyond what steps of the right length can give.
        """
        method = self.method
        loss = float(method.trainer.callback_metrics["train/loss"])
        nothing = 0.5 * method.heaviest_sample * method.target_scale**2
        if method.matching is not None:
            nothing = method.matching.loss_of_nothing
        if method.squared and math.isfinite(loss) and loss > _HOPELESS * nothing:
            raise FloatingPointError(
                f"the training loss of epoch {method.current_epoch} is {loss:.3g}, that of predicting zeros about "
                f"{nothing:.3g}: training diverges. Set method.optimizer.lr lower, or data.batch_size higher. "
                "Checkpoints of earlier epochs are kept."
            )
