"""Which layers the task needs: a table and a picture of the penalty that leave-one-out has learned."""

import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import pandas as pd
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lqf_lightning.linear import learned_penalty
from lqf_lightning.methods import LQF

from .pictures import save_picture

log = logging.getLogger(__name__)
_NAME = "learned_penalty"
_FILE = f"{_NAME}.parquet"
_LETTERS = 28  # of a group's name on an axis


class LearnedPenalty(Callback):
    """Writes ``learned_penalty.parquet`` and ``pictures/learned_penalty.png`` when training starts, and reports.

    The penalty has been settled by then, and nothing that training does changes it. Every epoch reports
    ``train/loo_acc`` and ``train/loo_loss``, leave-one-out accuracy and objective at the penalty that was kept, and
    ``train/probe_loo_acc``, the accuracy of the linear probe, where it is known. A run that has learned no penalty,
    because its ridge was given, it was resumed or no class has two images, says so and goes on.

    Attributes:
        written: Whether this run has learned a penalty, and it has been written.
    """

    def __init__(self) -> None:
        self.written = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the penalty, or say that there is none."""
        self._write(trainer, pl_module)
        if not self.written:
            _say_that_there_is_none(Path(trainer.default_root_dir) / _FILE)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report what leave-one-out promises, the same number on every rank."""
        penalty = _penalty_of(pl_module)
        if penalty is None:
            return
        report = {
            "loo_acc": float(penalty.accuracy[penalty.step]),
            "loo_loss": float(penalty.loss[penalty.step]),
            "probe_loo_acc": _probe_of(pl_module),
        }
        for name, value in report.items():
            if not math.isnan(value):
                pl_module.log(f"train/{name}", value, sync_dist=True)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Keep the penalty of a run that fails between its choice and the first step."""
        self._write(trainer, pl_module)

    def _write(self, trainer: Trainer, module: LightningModule) -> None:
        penalty = _penalty_of(module)
        if self.written or penalty is None:
            return
        self.written = True
        if not trainer.is_global_zero:
            return
        method = cast(LQF, module)  # nothing else has a penalty that was learned
        sizes = {name: delta.numel() for name, delta in method.linearized.deltas.items()}
        table = tabulate_penalty(penalty, method.penalty_groups, sizes)
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        table.to_parquet(folder / _FILE, index=False)
        picture = draw_penalty(table, penalty, exact=module.penalty_form == "full", probe=_probe_of(module))
        save_picture(trainer, picture, _NAME)
        _upload(trainer, table)


def tabulate_penalty(
    penalty: learned_penalty.LearnedPenalty, groups: Mapping[str, Sequence[str]], sizes: Mapping[str, int]
) -> pd.DataFrame:
    """One row per group of the penalty, from the first layers to the last.

    Args:
        penalty: What was learned.
        groups: Names of parameters by group, in forward order.
        sizes: Numbers of parameters by name.

    Returns:
        `group`, `first_layer` (the module of its first parameter), `parameters`, `scale` (s_g, that the group's kernel
        is multiplied with), `ridge_factor` (1 / s_g), and the group's part of the kernel's mean diagonal with equal
        scales and with these, `share_before` and `share_after`.
    """
    found = [group for group in groups if group in penalty.scales]
    table = pd.DataFrame({"group": found})
    table["first_layer"] = [groups[group][0].rpartition(".")[0] for group in found]
    table["parameters"] = [sum(sizes.get(name, 0) for name in groups[group]) for group in found]
    table["scale"] = [penalty.scales[group] for group in found]
    table["ridge_factor"] = 1 / table["scale"]
    after = pd.Series([penalty.share[group] for group in found])
    before = after / table["scale"]
    table["share_before"], table["share_after"] = before / before.sum(), after / after.sum()
    return table


def draw_penalty(
    table: pd.DataFrame, penalty: learned_penalty.LearnedPenalty, *, exact: bool, probe: float = math.nan
) -> Figure:
    """Which layers the task needs, and how leave-one-out went while that was learned.

    Args:
        table: As of `tabulate_penalty`.
        penalty: What was learned.
        exact: Whether the kernel is that of the model itself, or a surrogate.
        probe: Leave-one-out accuracy of the linear probe, to compare with; NaN leaves it out.

    Returns:
        A figure of three panels.
    """
    figure = Figure(figsize=(10, max(4.2, 1.6 + 0.26 * len(table))), layout="constrained")
    panels = figure.subplot_mosaic([["layers", "loss"], ["layers", "accuracy"]], width_ratios=(1.25, 1))
    _draw_layers(panels["layers"], table)
    for name, values in (("loss", penalty.loss), ("accuracy", penalty.accuracy)):
        axes, numbers = panels[name], values.tolist()
        axes.plot(range(len(numbers)), numbers, color="C0", marker="o" if len(numbers) == 1 else None)
        axes.axvline(penalty.step, color="C3", linestyle="--", label=f"kept: {numbers[penalty.step]:.3g}")
        axes.set(title=f"leave-one-out {name}")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.grid(alpha=0.3)
    if not math.isnan(probe):
        panels["accuracy"].axhline(probe, color="C2", linestyle=":", label=f"linear probe: {probe:.3g}")
    for name in ("loss", "accuracy"):
        panels[name].legend(fontsize="small")
    panels["accuracy"].set_xlabel("step of the learning")
    kind = "exact" if exact else "surrogate: trace kernel, one weight vector per output"
    figure.suptitle(f"learned penalty ({kind})", fontsize="medium")
    return figure


def _draw_layers(axes: Axes, table: pd.DataFrame) -> None:
    rows = range(len(table))
    axes.barh(rows, table["share_after"], height=0.72, color="C0", label="learned")
    axes.barh(rows, table["share_before"], height=0.72, fill=False, edgecolor="0.25", label="equal ridge")
    names = [name if len(name) <= _LETTERS else f"...{name[3 - _LETTERS :]}" for name in table["group"]]
    axes.set_yticks(list(rows), names, fontsize="small")
    axes.set_ylim(len(table) - 0.4, -0.6)  # the input is at the top
    axes.set(xlabel="part of the kernel's diagonal", title="which layers the task needs")
    axes.grid(axis="x", alpha=0.3)
    axes.set_axisbelow(True)
    axes.legend(fontsize="small")


def _penalty_of(module: LightningModule) -> learned_penalty.LearnedPenalty | None:
    penalty = getattr(module, "learned_penalty", None)
    if not isinstance(penalty, learned_penalty.LearnedPenalty):
        return None
    # Where no class has two images nothing could judge: what was taken instead tells nothing about layers.
    return None if math.isnan(float(penalty.loss[penalty.step])) else penalty


def _probe_of(module: LightningModule) -> float:
    outlook = getattr(module, "outlook", None)
    return math.nan if outlook is None else float(outlook.probe)


def _upload(trainer: Trainer, table: pd.DataFrame) -> None:
    for logger in trainer.loggers:
        if isinstance(logger, WandbLogger):
            logger.log_table(f"train/{_NAME}", dataframe=table)


@rank_zero_only
def _say_that_there_is_none(file: Path) -> None:
    kept = f"; {file} is that of an earlier start" if file.exists() else ""
    log.info(
        "no learned penalty: this start has learned none. Set method=lqf with method.metric=learned and "
        "method.ridge=auto for one, and give two training images of a class at least%s",
        kept,
    )
