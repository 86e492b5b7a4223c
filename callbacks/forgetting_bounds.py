"""How much a linear model holds about cohorts of its training samples, and what forgetting each would cost."""

import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lqf_lightning.analysis.cohort_bounds import CohortBounds, cohort_bounds
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.methods import LQF

from .forgetting_checks import parse_cohorts, refuse_bound_options, refuse_bound_run, refuse_seen_cohorts
from .forgetting_record import ForgettingRecord, price_cohorts

log = logging.getLogger(__name__)
_USUAL = {"sample": {"fraction": 0.01, "seed": 0}}


class ForgettingBounds(Callback):
    """Writes ``forgetting_bounds.parquet`` and ``.json``: curves of information, and the price of forgetting.

    Before the first step, the problem of the run is solved with all samples and without each cohort, exactly, from its
    kernel. That gives what forgetting will cost in validation accuracy, what the finished model will hold, and how many
    steps the scrub of each cohort will take by conjugate gradients without a preconditioner; one by Kronecker factors
    takes other steps, as a rule fewer. At the start, after every validation and at the end
    the present weights are held against the optima, whatever the solver: what noisy weights and noisy answers tell, in
    nats (see `CohortBounds.now`), logged as ``forget/COHORT/weights_nats`` and so on. The cohort ``nothing`` shows how
    unfinished training is. The reference is the same run without the cohort on images as they are evaluated, with the
    same ridge, normalization and initial head; what the cohort has done to those is not covered.

    Args:
        cohorts: What to forget, by name, for example ``{tenth: {fraction: 0.1, seed: 0}, buses: {class: bus}}``; see
            `Cohort.parse`. None: 1 % of the samples, by lot.
        sigma: Deviation of the noise that released weights carry.
        queries: Images in a set of queries, of the validation set and of each cohort.
        tolerance: Relative gradient at which scrubs stop; their cost is foretold for it.
        memory_gib: Memory for what the kernel is assembled from, in GiB.
        chunk_size: Images per pass of a rank; None: those of an evaluation batch.

    Attributes:
        bounds: What is measured against, from the start of training on.

    Raises:
        ValueError: An option is out of range, or there is no cohort.
    """

    def __init__(
        self,
        cohorts: Mapping[str, Any] | None = None,
        sigma: float = 1e-3,
        queries: int = 32,
        tolerance: float = 1e-3,
        memory_gib: float = 4.0,
        chunk_size: int | None = None,
    ) -> None:
        cohorts = dict(_USUAL if cohorts is None else cohorts)
        refuse_bound_options(
            cohorts, sigma=sigma, queries=queries, tolerance=tolerance, memory_gib=memory_gib, chunk_size=chunk_size
        )
        self.cohorts, self.sigma, self.queries, self.tolerance = cohorts, sigma, queries, tolerance
        self.memory_gib, self.chunk_size = memory_gib, chunk_size
        self.bounds: CohortBounds | None = None
        self._chosen: dict[str, Cohort] = {}
        self._prices: dict[str, dict[str, Any]] = {}
        self._rows: list[dict[str, Any]] = []

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run without a linear model, and cohorts that it cannot forget."""
        if stage == "fit":
            data = refuse_bound_run(trainer, pl_module)
            self._chosen = parse_cohorts(self.cohorts, data.manifest)
            refuse_seen_cohorts(data, self._chosen)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Solve without each cohort, and measure the weights to begin with."""
        kept = Path(trainer.default_root_dir) / "forgetting_bounds_kernel"  # finished parts, for a run that is killed
        self.bounds = cohort_bounds(
            cast(LQF, pl_module),
            {name: cohort.indices for name, cohort in self._chosen.items()},
            sigma=self.sigma,
            queries=self.queries,
            tolerance=self.tolerance,
            memory_gib=self.memory_gib,
            chunk_size=self.chunk_size,
            folder=kept,
        )
        trainer.strategy.barrier("forgetting_bounds")
        if trainer.is_global_zero:
            shutil.rmtree(kept, ignore_errors=True)
            _warn_of_rough(self.bounds)
        self._prices = price_cohorts(self.bounds, self._chosen, self.tolerance)
        ForgettingRecord(trainer).announce(self._prices)
        self._measure(trainer)
        self._write(trainer, draw=True)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the present weights, for loggers and for callbacks that watch a metric."""
        if self._active(trainer):
            for name, value in self._measure(trainer).items():
                # The same on every rank; sync_dist silences Lightning's advice.
                pl_module.log(name, value, sync_dist=True, batch_size=1)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note the accuracy that has been measured beside, and write the curves down."""
        if self._active(trainer):
            accuracy = trainer.callback_metrics.get("val/acc")
            for row in self._rows:
                if row["step"] == trainer.global_step and accuracy is not None:
                    row["accuracy"] = float(accuracy)
            self._write(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure the weights that training has arrived at, unless a validation just has."""
        if self.bounds is not None:
            if not any(row["step"] == trainer.global_step for row in self._rows):
                ForgettingRecord(trainer).log(self._measure(trainer))
            self._write(trainer, draw=True)

    def _active(self, trainer: Trainer) -> bool:
        return self.bounds is not None and trainer.state.fn == TrainerFn.FITTING and not trainer.sanity_checking

    def _measure(self, trainer: Trainer) -> dict[str, float]:
        found, step = cast(CohortBounds, self.bounds).now(), trainer.global_step
        fresh = [{"epoch": trainer.current_epoch, "step": step, "cohort": c, **row} for c, row in found.items()]
        self._rows = [row for row in self._rows if row["step"] < step] + fresh
        named = {f"forget/{c}/{name}": value for c, row in found.items() for name, value in row.items()}
        return {name: value for name, value in named.items() if value is not None}

    def _write(self, trainer: Trainer, *, draw: bool = False) -> None:
        ForgettingRecord(trainer).write(self._rows, cast(CohortBounds, self.bounds), self._prices, draw=draw)

    def state_dict(self) -> dict[str, Any]:
        """Keep the curves.

        Returns:
            Plain values.
        """
        return {"rows": self._rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on with the curves of the interrupted run."""
        self._rows = list(state_dict["rows"])


def _warn_of_rough(bounds: CohortBounds) -> None:
    for name, distance in bounds.rough().items():
        log.warning(
            "cohort %s: single precision finds the optimum within %.3g only, farther than forgetting moves weights: "
            "these numbers are rough. Set method.ridge higher (or auto), or trainer.precision=64-true",
            name,
            distance,
        )
