"""What every ridge would have given: a table and a picture of the choice that ``method.ridge=auto`` made."""

import logging
from pathlib import Path

import pandas as pd
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator

from lqf_lightning import linear
from lqf_lightning.methods.leaking_start import seen_at_start

from .pictures import save_picture

log = logging.getLogger(__name__)
_FILE = "regularization_path.parquet"
_WIDE = 10.0


class RegularizationPath(Callback):
    """Writes ``regularization_path.parquet`` and ``pictures/regularization_path.png`` when training starts.

    The ridge has been settled by then, and nothing that training does changes the path. A run without a path, because
    its ridge was given or it was resumed, says so and goes on.

    Attributes:
        written: Whether this run has a path, and it has been written.
    """

    def __init__(self) -> None:
        self.written = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the path, or say that there is none."""
        self._write(trainer, pl_module)
        if not self.written:
            _say_that_there_is_none(Path(trainer.default_root_dir) / _FILE)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the path of a run that fails between the choice of its ridge and the first step."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        path: linear.RegularizationPath | None = getattr(module, "path", None)
        if self.written or path is None:
            return
        self.written = True
        if not trainer.is_global_zero:
            return
        table = tabulate_path(path, float(module.ridge))  # type: ignore[arg-type]  # an LQF: nothing else has a path
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / _FILE, index=False)
        seen = seen_at_start(getattr(trainer, "datamodule", None))
        judged = "" if seen is None else f", judged by {int((~seen).sum())} of {len(seen)} images"
        figure = draw_path(table, exact=module.path_form == "full", judged=judged)
        save_picture(trainer, figure, "regularization_path")


def tabulate_path(path: linear.RegularizationPath, mu: float) -> pd.DataFrame:
    """One row per ridge.

    Args:
        path: The path, R ridges.
        mu: The ridge that was chosen, in the mean form of `method.ridge`.

    Returns:
        R rows: `ridge` (lambda of the sum form), `mu` (of the mean form), `chosen`, `accuracy`, `press` and
        `cross_entropy` of leave-one-out predictions (the first and the last NaN for a single output), `gcv`,
        `degrees_of_freedom`, `weight_norm` (|dw| in the metric) and `training_error`.
    """
    samples = path.residual.shape[1]
    number = (path.ridges - linear.ridge_of_mean(mu, samples)).abs().argmin()
    table = pd.DataFrame({"ridge": path.ridges.tolist()})
    table["mu"] = [linear.mean_of_ridge(ridge, samples) for ridge in table["ridge"]]
    table["chosen"] = table.index == int(number)
    for name in ("accuracy", "press", "cross_entropy", "gcv", "degrees_of_freedom", "weight_norm", "training_error"):
        values = getattr(path, name)
        table[name] = float("nan") if values is None else values.tolist()
    return table


def draw_path(table: pd.DataFrame, *, exact: bool, judged: str = "") -> Figure:
    """Leave-one-out accuracy and PRESS over ridges, the chosen one marked.

    Args:
        table: As of `tabulate_path`.
        exact: Whether the path is that of the model itself, or of a surrogate.
        judged: Which images leave-one-out judges by, in words for the title, where the starting weights know others.

    Returns:
        A figure of two panels, one where the accuracy is not defined.
    """
    several = bool(table["accuracy"].notna().any())
    figure = Figure(figsize=(9 if several else 5, 3.6), layout="constrained")
    panels = figure.subplots(1, 2 if several else 1, squeeze=False)[0]
    (chosen,) = table.loc[table["chosen"], "mu"]
    names = ["accuracy", "press"] if several else ["press"]
    for axes, name in zip(panels, names, strict=True):
        axes.plot(table["mu"], table[name], "o-", markersize=4)
        axes.axvline(chosen, color="C3", linestyle="--", label=f"chosen: {chosen:.3g}")
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(numticks=7))
        axes.set(xlabel="ridge (method.ridge)", title=f"leave-one-out {name if name == 'accuracy' else 'PRESS'}")
        axes.grid(alpha=0.3)
        axes.legend()
    if table["press"].max() > _WIDE * table["press"].min():
        panels[-1].set_yscale("log")  # a peak at small ridges would flatten the minimum
    kind = "exact" if exact else "surrogate: trace kernel, one weight vector per output"
    figure.suptitle(f"regularization path ({kind}{judged})", fontsize="medium")
    return figure


@rank_zero_only
def _say_that_there_is_none(file: Path) -> None:
    kept = f"; {file} is that of an earlier start" if file.exists() else ""
    log.info("no regularization path: the ridge was not chosen in this start. Set method.ridge=auto for one%s", kept)
