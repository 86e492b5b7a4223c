"""What remains of forgetting bounds: a table of curves, a report, a picture, and metrics."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger

from lqf_lightning.analysis.cohort_bounds import CohortBounds
from lqf_lightning.analysis.cohort_optima import NOTHING
from lqf_lightning.analysis.training_time_report import write_report
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.data.table_file import write_table

from .forgetting_pictures import draw_forgetting
from .pictures import save_picture

_COLUMNS = [
    "epoch", "step", "cohort", "weights_nats", "intercept_nats", "least_nats", "outputs_nats", "cohort_outputs_nats",
    "accuracy",
]  # fmt: skip
_PRICES = ["accuracy_cost", "loss_cost", "optimum_nats", "scrub_steps", "scrub_passes", "scrub_seconds"]
_ASSUMES = (
    "the reference is the optimum without the cohort: the same options, ridge, targets and normalization, on images as "
    "they are evaluated",
    "weights are released once, with Gaussian noise of deviation sigma on every trained number, the intercept included",
    "nats of outputs are those of one noisy model that answers all queries exactly",
    "scrubs are foretold for conjugate gradients without a preconditioner, from the optimum on all samples",
    "the initial head, batch-norm statistics, hyper-parameters and early stopping may have seen the cohort: that is "
    "not covered",
)


@dataclass(frozen=True)
class ForgettingRecord:
    """Writes bounds down; every rank may call it, the first one writes.

    Attributes:
        trainer: The running trainer.
    """

    trainer: Trainer

    def announce(self, prices: Mapping[str, Mapping[str, Any]]) -> None:
        """Log what is known before training: what forgetting will cost.

        Args:
            prices: As of `price_cohorts`.
        """
        named = {f"forget/{name}/{key}": row[key] for name, row in prices.items() for key in _PRICES}
        self.log({name: value for name, value in named.items() if value is not None})

    def log(self, metrics: Mapping[str, float]) -> None:
        """Hand numbers to all loggers.

        Args:
            metrics: Numbers by key.
        """
        if self.trainer.is_global_zero:
            for logger in self.trainer.loggers:
                logger.log_metrics(dict(metrics), step=self.trainer.global_step)

    def write(
        self,
        rows: Sequence[Mapping[str, Any]],
        bounds: CohortBounds,
        prices: Mapping[str, Mapping[str, Any]],
        *,
        draw: bool,
    ) -> None:
        """Write ``forgetting_bounds.parquet`` and ``.json``, and if asked for the picture and a table in W&B.

        Args:
            rows: The curves, a row per step and cohort.
            bounds: What they were measured against.
            prices: As of `price_cohorts`.
            draw: Whether to draw.
        """
        if not self.trainer.is_global_zero:
            return
        folder = Path(self.trainer.default_root_dir)
        table = pd.DataFrame(list(rows)).reindex(columns=_COLUMNS)
        table = table.astype(dict.fromkeys(_COLUMNS[3:], float))
        write_table(table, folder / "forgetting_bounds.parquet", {"forgetting_bounds": {"sigma": bounds.sigma}})
        method = bounds.method
        report = {
            "sigma": bounds.sigma, "ridge": method.ridge, "samples": len(bounds.optima[NOTHING].solution.outputs),
            "sweep_seconds": bounds.seconds, "cohorts": prices, "assumes": list(_ASSUMES),
        }  # fmt: skip
        write_report(folder / "forgetting_bounds.json", report)
        if draw:
            save_picture(self.trainer, draw_forgetting(table, prices, bounds.sigma), "forgetting_bounds")
            self._upload(prices)

    def _upload(self, prices: Mapping[str, Mapping[str, Any]]) -> None:
        shown = pd.DataFrame([
            {"cohort": name, **{key: row[key] for key in ("asked", "number", *_PRICES)}} for name, row in prices.items()
        ])  # fmt: skip
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("forget/cohorts", dataframe=shown)


def price_cohorts(bounds: CohortBounds, cohorts: Mapping[str, Cohort], tolerance: float) -> dict[str, dict[str, Any]]:
    """What each cohort holds in a finished model, and what forgetting it costs.

    Args:
        bounds: The bounds.
        cohorts: Cohorts by name.
        tolerance: Relative gradient at which scrubs stop.

    Returns:
        By cohort: how it was `asked` for, `number` of samples, `accuracy`, `loss` and their costs on the validation set
        (see `cohort_costs`), `optimum_nats` (weights at the optimum), `optimum_outputs_nats`,
        `optimum_cohort_outputs_nats`, `relative_gradient` and `distance_bound` of the optimum without it, `scrub_steps`
        (None if the tolerance is not reached), `scrub_passes`, `scrub_seconds` and `scrub_curve`, the relative gradient
        after every step.
    """
    finished, found = bounds.at_optimum(), {}
    for name, cohort in cohorts.items():
        optimum, nats = bounds.optima[name], finished[name]
        scrub, number = optimum.scrub, len(cohort)
        done = scrub if scrub is not None and scrub.reached else None
        share = 1 - number / len(optimum.solution.outputs)
        costs = dict.fromkeys(("accuracy", "loss", "accuracy_cost", "loss_cost"), None) | bounds.costs[name]
        found[name] = {
            "asked": cohort.spec, "number": number, **costs,
            "optimum_nats": nats["weights_nats"], "optimum_outputs_nats": nats["outputs_nats"],
            "optimum_cohort_outputs_nats": nats["cohort_outputs_nats"],
            "relative_gradient": optimum.certificate.relative_gradient,
            "distance_bound": optimum.certificate.distance_bound,
            "scrub_tolerance": tolerance,
            "scrub_steps": None if done is None else done.steps,
            "scrub_passes": None if done is None else done.passes,
            "scrub_seconds": None if done is None else share * done.sweeps * bounds.seconds,
            "scrub_curve": [] if scrub is None else list(scrub.relative_gradient),
        }  # fmt: skip
    return found
