"""What remains of a comparison: a table of flips, a summary and pictures, in the run folder and in W&B."""

import json
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from lqf_lightning.congruence.flip_counts import FlipTally
from lqf_lightning.data import Manifest
from lqf_lightning.data.thumbnails import load_thumbnails
from lqf_lightning.teachers import StoredPredictions

from .flip_checks import data_of
from .flip_pictures import draw_flip_matrix, draw_flips
from .flip_rates import summarize
from .pictures import save_picture

_FILE = "negative_flips.json"
_LETTERS = 40  # ensembles and paths have long names


@dataclass(frozen=True)
class FlipRecord:
    """Writes down one comparison; to be used by the first process only.

    Attributes:
        trainer: The running trainer.
        stage: "val" or "test".
        split: The split that was evaluated.
        name: What the old model is called, "" for the only one.
        max_images: How many flips are shown.
        model: Which model this is of, for the summary: `epoch`, from 0, or `checkpoint`.
    """

    trainer: Trainer
    stage: str
    split: str
    name: str
    max_images: int
    model: dict[str, Any]

    def write(
        self, old: StoredPredictions, tally: FlipTally, index: Tensor, prediction: Tensor, confidence: Tensor
    ) -> None:
        """Write ``negative_flips.json``, ``negative_flips_STAGE.parquet`` and pictures, and log tables to W&B.

        Args:
            old: What the old model predicted.
            tally: Counts of all samples.
            index: Rows of the manifest of all samples (N,).
            prediction: What the new model predicts (N,).
            confidence: With which probability (N,).
        """
        data, ending = data_of(self.trainer), f"{self.stage}_{self.name}" if self.name else self.stage
        folder = Path(self.trainer.default_root_dir)
        flips = tabulate_flips(data.manifest, old, index, prediction, confidence)
        summary = self.model | summarize(tally, data.classes, old.name)
        folder.mkdir(parents=True, exist_ok=True)
        flips.to_parquet(folder / f"negative_flips_{ending}.parquet", index=False)
        _add(folder / _FILE, f"{self.stage}/{self.name}" if self.name else self.stage, summary)
        shown = flips.head(self.max_images)
        images = load_thumbnails(data, self.split, shown["index"].tolist())
        called = self.name or (old.name if len(old.name) <= _LETTERS else f"...{old.name[-_LETTERS:]}")
        title = f"{self.stage}, upgrade of {called}: {len(flips)} negative flips of {summary['number']} samples"
        save_picture(self.trainer, draw_flips(shown, images, title), f"negative_flips_{ending}")
        save_picture(self.trainer, draw_flip_matrix(flips, title), f"flip_matrix_{ending}")
        self._upload(shown, images, summary)

    def _upload(self, shown: pd.DataFrame, images: list[Image.Image], summary: dict[str, Any]) -> None:
        ending = f"/{self.name}" if self.name else ""
        classes = pd.DataFrame.from_dict(summary["classes"], orient="index").rename_axis("class").reset_index()
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                # The library that the logger speaks to; nothing else here needs it.
                wandb = sys.modules[type(logger.experiment).__module__.partition(".")[0]]
                rows = [
                    [wandb.Image(image), *row] for image, row in zip(images, shown.to_numpy().tolist(), strict=True)
                ]
                logger.log_table(f"{self.stage}/negative_flips{ending}", ["image", *shown], rows)
                logger.log_table(f"{self.stage}/negative_flips_by_class{ending}", dataframe=classes)


def tabulate_flips(
    manifest: Manifest, old: StoredPredictions, index: Tensor, prediction: Tensor, confidence: Tensor
) -> pd.DataFrame:
    """List the samples that the old model gets right and the new one wrong.

    Args:
        manifest: The samples of the run.
        old: What the old model predicted.
        index: Rows of the manifest (N,).
        prediction: What the new model predicts (N,).
        confidence: With which probability (N,).

    Returns:
        A row per negative flip, the most confident mistakes first: `index`, `path`, `class` (the true one), and what
        the models say, `old_prediction`, `old_confidence` (NaN if it is not known), `new_prediction`,
        `new_confidence`.
    """
    position, old_confidence = old.predictions(index)
    table = manifest.table.loc[index.tolist(), ["index", "path", "class"]].reset_index(drop=True)
    table["old_prediction"] = [old.classes[row] for row in position.tolist()]
    table["old_confidence"] = old_confidence.numpy()
    table["new_prediction"] = [manifest.classes[row] for row in prediction.tolist()]
    table["new_confidence"] = confidence.numpy()
    flipped = (table["old_prediction"] == table["class"]) & (table["new_prediction"] != table["class"])
    return table[flipped].sort_values("new_confidence", ascending=False, kind="stable").reset_index(drop=True)


@rank_zero_only
def forget_record(trainer: Trainer) -> None:
    """Clear the summary that an earlier run left in the folder of a fresh one.

    Args:
        trainer: The running trainer.
    """
    (Path(trainer.default_root_dir) / _FILE).unlink(missing_ok=True)


def _add(path: Path, key: str, summary: dict[str, Any]) -> None:
    known = json.loads(path.read_text()) if path.exists() else {}
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps({**known, key: summary}, indent=2, allow_nan=False) + "\n")
    partial.replace(path)
