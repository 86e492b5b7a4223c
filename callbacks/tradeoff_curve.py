"""What every strength of matching would have given: a table and a picture of error against negative flips."""

import logging
from pathlib import Path

import numpy as np
import pandas as pd
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from lqf_lightning.congruence import tradeoff
from lqf_lightning.congruence.intervals import flip_intervals

from .pictures import save_picture

log = logging.getLogger(__name__)
_FILE = "tradeoff_curve.parquet"
_CELLS = {"both_wrong": (0, 0), "positive_flips": (0, 1), "negative_flips": (1, 0), "both_right": (1, 1)}


class TradeoffCurve(Callback):
    """Writes ``tradeoff_curve.parquet`` and ``pictures/tradeoff_curve.png`` when training starts.

    The strengths of ``method.tradeoff`` have been compared by then. A run that has compared none, or was resumed, says
    so and goes on.

    Attributes:
        written: Whether this run has a curve, and it has been written.
    """

    def __init__(self) -> None:
        self.written = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the curve, or say that there is none."""
        self._write(trainer, pl_module)
        if not self.written:
            _say_that_there_is_none(Path(trainer.default_root_dir) / _FILE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the curve of a run that fails between the comparison and the first step."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        curve: tradeoff.TradeoffCurve | None = getattr(module, "tradeoff_curve", None)
        if self.written or curve is None:
            return
        self.written = True
        if not trainer.is_global_zero:
            return
        options = module.hparams
        table = tabulate_tradeoff(curve, float(options["alpha"]), float(options["beta"]))
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / _FILE, index=False)
        save_picture(trainer, draw_tradeoff(table), "tradeoff_curve")


def tabulate_tradeoff(curve: tradeoff.TradeoffCurve, alpha: float, beta: float) -> pd.DataFrame:
    """One row per strength.

    Args:
        curve: The curve, P strengths.
        alpha: Strength of the run itself.
        beta: See `alpha`.

    Returns:
        P rows: `alpha`, `beta`, `chosen` (the strength of the run), `error`, `nfr`, `pfr` and `relative_nfr` (fractions
        of the validation samples whose class the reference knows), `error_low`, `error_high`, `nfr_low` and `nfr_high`
        (95 % bootstrap intervals), the counts `both_wrong`, `positive_flips`, `negative_flips` and `both_right` behind
        them, `objective` (sum form), `relative_gradient` and `reference_error`.
    """
    table = pd.DataFrame({"alpha": curve.alpha.tolist(), "beta": curve.beta.tolist()})
    table["chosen"] = (table["alpha"] == alpha) & (table["beta"] == beta)
    rates, intervals = curve.rates, flip_intervals(curve.counts)
    for column, name in (("error", "error_new"), ("nfr", "nfr"), ("pfr", "pfr"), ("relative_nfr", "relative_nfr")):
        table[column] = rates[name].tolist()
    for column, name in (("error", "error_new"), ("nfr", "nfr")):
        table[f"{column}_low"], table[f"{column}_high"] = intervals[name].low.tolist(), intervals[name].high.tolist()
    for column, (old, new) in _CELLS.items():
        table[column] = curve.counts[:, old, new].tolist()
    table["objective"], table["relative_gradient"] = curve.objective.tolist(), curve.relative_gradient.tolist()
    table["reference_error"] = curve.reference_error
    return table


def draw_tradeoff(table: pd.DataFrame) -> Figure:
    """Error against negative flips, one line per alpha, with intervals.

    Args:
        table: As of `tabulate_tradeoff`.

    Returns:
        A figure whose best corner is the lower left one.
    """
    figure = Figure(figsize=(7, 5), layout="constrained")
    axes = figure.subplots()
    for number, (alpha, line) in enumerate(table.groupby("alpha")):
        color, ordered = f"C{number}", line.sort_values("beta")
        across, up = (
            np.array([ordered[rate] - ordered[f"{rate}_low"], ordered[f"{rate}_high"] - ordered[rate]])
            for rate in ("nfr", "error")
        )
        axes.errorbar(ordered["nfr"], ordered["error"], up, across, fmt="none", ecolor=color, elinewidth=1, alpha=0.3)
        axes.plot(ordered["nfr"], ordered["error"], "o-", color=color, markersize=5, label=f"alpha = {alpha:g}")
        for _, point in ordered.iterrows():
            axes.annotate(
                f"{point['beta']:g}", (point["nfr"], point["error"]), textcoords="offset points", xytext=(5, 5),
                color=color, fontsize=8,
            )  # fmt: skip
    own = table[table["chosen"]]
    if len(own):
        axes.plot(own["nfr"], own["error"], "o", markersize=13, fillstyle="none", color="black", label="this run")
    axes.axhline(table["reference_error"].iloc[0], color="black", linestyle="--", linewidth=1, label="reference")
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter(PercentFormatter(xmax=1))
    axes.set(xlabel="negative flip rate (right before, wrong now)", ylabel="validation error")
    axes.grid(alpha=0.3)
    axes.legend(fontsize="small")
    samples = int(table[list(_CELLS)].iloc[0].sum())
    figure.suptitle(f"points: beta; bars: 95 % intervals from {samples} samples", fontsize="medium")
    return figure


@rank_zero_only
def _say_that_there_is_none(file: Path) -> None:
    kept = f"; {file} is that of an earlier start" if file.exists() else ""
    log.info(
        "no tradeoff curve: no strengths were compared in this start. Set method.solver=kernel and "
        "'method.tradeoff={alpha: [0, 1], beta: [0, 5]}' for one%s", kept,
    )  # fmt: skip
