"""What remains of the scores of samples: a table, pictures, and W&B's tables."""

import logging
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from PIL import Image
from torch import Tensor
from torchmetrics.functional.classification import binary_auroc

from lqf_lightning.analysis import SampleScores
from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.table_file import read_notes, write_table
from lqf_lightning.data.thumbnails import load_thumbnails
from lqf_lightning.methods.leaking_start import seen_at_start

from .pictures import save_picture
from .sample_pictures import draw_by_class, draw_ends, draw_suspects

log = logging.getLogger(__name__)
FILE = "sample_information.parquet"
_KEY = "sample_information"
_INFLUENCE = "local_influence"
_CLASSES = 30  # that get a histogram of their own


@dataclass(frozen=True)
class SampleRecord:
    """Writes down scores; every rank may call it, the first one writes.

    Attributes:
        trainer: The running trainer.
        top: Samples at each end that are shown.
    """

    trainer: Trainer
    top: int

    @property
    def data(self) -> ImageDataModule:
        """The data of the run."""
        return cast(ImageDataModule, self.trainer.datamodule)  # type: ignore[attr-defined]  # set at run time

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.trainer.default_root_dir)

    def write(self, scores: SampleScores) -> None:
        """Write ``sample_information.parquet`` and its pictures, and log tables to W&B.

        Samples whose labels the starting weights know are marked in the column `seen_by_weights`, and not shown.

        Args:
            scores: Of all training samples, the same on every rank.
        """
        if not self.trainer.is_global_zero:
            return
        table = tabulate_scores(scores, self.data.manifest)
        seen = seen_at_start(self.data, scores.index)
        whole = table if seen is None else table.assign(seen_by_weights=seen.tolist())
        self.folder.mkdir(parents=True, exist_ok=True)
        write_table(whole, self.folder / FILE, {_KEY: scores.settings})
        table = table if seen is None else table[~seen.cpu().numpy()].reset_index(drop=True)
        shown = self._show(table, scores.settings)
        self._tell_known_errors(table)
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                by = ranking(table)
                wandb = sys.modules[type(logger.experiment).__module__.partition(".")[0]]  # the logger's own library
                for name, (rows, images) in shown.items():
                    kept = rows.drop(columns="leave_one_out")
                    content = [
                        [wandb.Image(image), *row] for image, row in zip(images, kept.to_numpy().tolist(), strict=True)
                    ]
                    logger.log_table(f"sample_information/{name}", ["image", *kept], content)
                summary = summarize_classes(table)
                logger.log_table("sample_information/by_class", dataframe=summary)
                values = {name: rows[by].tolist() for name, rows in table.groupby("class")}
                logger.experiment.log({
                    f"sample_information/histogram/{name}": wandb.Histogram(values[name])
                    for name in summary["class"].head(_CLASSES)
                })  # fmt: skip

    def _show(self, table: pd.DataFrame, settings: dict[str, Any]) -> dict[str, tuple[pd.DataFrame, list[Image.Image]]]:
        number = min(self.top, len(table) // 2) or 1
        ordered = table.sort_values(ranking(table), ascending=False, kind="stable")
        suspects = table[table["class"] != table["proposed"]].sort_values("suspicion_rank")
        chosen = {
            "most_informative": ordered.head(number), "least_informative": ordered.tail(number)[::-1],
            "label_suspects": suspects.head(2 * number),
        }  # fmt: skip
        shown = {name: (rows, self._images(rows)) for name, rows in chosen.items()}
        said = describe(settings)
        ends = (*shown["most_informative"], *shown["least_informative"])
        save_picture(self.trainer, draw_ends(*ends, by=ranking(table), settings=said), "sample_information")
        save_picture(self.trainer, draw_suspects(*shown["label_suspects"], settings=said), "label_suspects")
        by_class = draw_by_class(table, by=ranking(table), settings=said)
        save_picture(self.trainer, by_class, "sample_information_by_class")
        return shown

    def _images(self, rows: pd.DataFrame) -> list[Image.Image]:
        return load_thumbnails(self.data, "train", rows["index"].tolist())

    def _tell_known_errors(self, table: pd.DataFrame) -> None:
        # Labels that data.label_noise has changed are known, so that the ranking can be judged.
        known = self.data.manifest.table.loc[table["index"]]
        wrong = (known["label"] != known["true_label"]).to_numpy()
        if not 0 < wrong.sum() < len(wrong):
            return
        place = 1 - torch.tensor(table["suspicion_rank"].to_numpy()) / len(table)  # in [0, 1), and so taken as it is
        area = float(binary_auroc(place, torch.tensor(wrong)))
        log.info("%d labels are known to be wrong; area under the ROC curve of the suspicion: %.3f", wrong.sum(), area)
        for logger in self.trainer.loggers:
            logger.log_metrics({"train/label_error_auc": area})

    def write_groups(self, groups: pd.DataFrame) -> None:
        """Write ``sample_information_groups.parquet``, and a table to W&B.

        Args:
            groups: As of `score_groups`.
        """
        if not self.trainer.is_global_zero:
            return
        write_table(groups, self.folder / "sample_information_groups.parquet")
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("sample_information/groups", dataframe=groups)

    def add_influence(self, index: Tensor, influence: Tensor) -> None:
        """Add the column `local_influence` to the table, or write it alone if there is none.

        Args:
            index: Manifest index (n,).
            influence: Approximate influence at the present weights (n,).
        """
        if not self.trainer.is_global_zero:
            return
        found = self.data.manifest.table.loc[index.tolist(), ["index", "path", "label", "class"]]
        found = found.assign(**{_INFLUENCE: influence.tolist()}).reset_index(drop=True)
        file = self.folder / FILE
        settings: dict[str, Any] = {}
        if file.exists():
            known, settings = read_scores(file)
            found = known.drop(columns=_INFLUENCE, errors="ignore").merge(
                found[["index", _INFLUENCE]], on="index", how="left"
            )
        write_table(found, file, {_KEY: settings})


def tabulate_scores(scores: SampleScores, manifest: Manifest) -> pd.DataFrame:
    """One row per training sample, by ascending index.

    Args:
        scores: The scores (n).
        manifest: The samples of the run.

    Returns:
        `index`, `path`, `label`, `class` (its name), `proposed` (the class that the model without the sample gives it),
        `suspicion` (nats that the given label costs by that model), `suspicion_rank` (from 1, equals by `margin`),
        `margin` (how far the given class is behind the best other one), `residual` (norm of the
        leave-one-out residual), `memorization`, `weight_information`, `function_information`, `leverage`,
        `langevin_information`, `steady_state_information` (missing where they do not exist), and `leave_one_out`, the
        outputs of the model without the sample.
    """
    index, suspects = scores.index.tolist(), scores.suspects
    table = manifest.table.loc[index, ["index", "path", "label", "class"]].reset_index(drop=True)
    table["proposed"] = [manifest.classes[position] for position in suspects.proposed.tolist()]
    table["suspicion"] = (suspects.suspicion + 0.0).tolist()  # no minus zeros
    table["suspicion_rank"] = 0
    table["margin"] = suspects.margin.tolist()
    # Where no temperature beats guessing, or all labels are right by far, suspicions are equal and margins are not.
    order = table.sort_values(["suspicion", "margin"], ascending=False, kind="stable").index
    table.loc[order, "suspicion_rank"] = range(1, len(table) + 1)
    table["residual"] = scores.residual.norm(dim=1).tolist()
    table["memorization"] = scores.memorization.tolist()
    for name in (
        "weight_information", "function_information", "leverage", "langevin_information", "steady_state_information"
    ):  # fmt: skip
        values: Tensor | None = getattr(scores, name)
        if values is not None:
            table[name] = values.tolist()
    table["leave_one_out"] = scores.prediction.float().tolist()
    return table


def ranking(table: pd.DataFrame) -> str:
    """The score that says how much a sample tells.

    Args:
        table: As of `tabulate_scores`.

    Returns:
        The name of a column: information in the outputs, or without validation images that in the weights.
    """
    return "function_information" if "function_information" in table else "weight_information"


def summarize_classes(table: pd.DataFrame) -> pd.DataFrame:
    """How much the samples of each class tell.

    Args:
        table: As of `tabulate_scores`.

    Returns:
        A row per class, the most informative first: number of samples, mean, median and total information, and how
        many labels are contradicted.
    """
    grouped = table.assign(contradicted=table["class"] != table["proposed"]).groupby("class")
    values = grouped[ranking(table)]
    summary = pd.DataFrame({
        "samples": values.size(), "mean": values.mean(), "median": values.median(), "total": values.sum(),
        "contradicted": grouped["contradicted"].sum(),
    })  # fmt: skip
    return summary.rename_axis("class").reset_index().sort_values("mean", ascending=False, ignore_index=True)


def describe(settings: dict[str, Any]) -> str:
    """What scores depend on, in a line.

    Args:
        settings: Of `SampleScores`.

    Returns:
        Words for a picture.
    """
    kind = "exact" if settings["exact"] else f"surrogate: {settings['kernel']} kernel"
    kind = f"linear model of the run, {kind}" if settings["twin"] else kind
    end = "at the optimum" if settings["time"] is None else f"at time {settings['time']:.3g}"
    return f"{kind}, {end}, ridge {settings['ridge']:.3g}, sigma {settings['sigma']:g}"


def read_scores(file: Path) -> tuple[pd.DataFrame, dict[str, Any]]:
    """Read a table of scores.

    Args:
        file: ``sample_information.parquet``.

    Returns:
        The table, and what its scores depend on.
    """
    return pd.read_parquet(file), read_notes(file, _KEY) or {}
