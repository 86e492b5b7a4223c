"""What remains of learning speeds: a table of all training samples and pictures, in the run folder and in W&B."""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pandas as pd
from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_only
from PIL import Image
from torch import Tensor

from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.sample_ledger import SampleColumns
from lqf_lightning.data.table_file import write_table
from lqf_lightning.data.thumbnails import load_thumbnails
from lqf_lightning.information.sample_outcomes import OUTCOMES

from .learning_pictures import draw_extremes, draw_learning
from .pictures import save_picture

_FILE = "learning_speed.parquet"
_EPOCHS = "learning_speed"  # folder of the columns of every epoch
_ORDER = ["cumulative_correctness", "cumulative_confidence"]


@dataclass(frozen=True)
class LearningRecord:
    """Writes down how a run learned its samples; to be used by the first process only.

    Attributes:
        trainer: The running trainer.
        top: How many of the hardest and of the easiest samples are shown.
    """

    trainer: Trainer
    top: int

    def write(self, scores: Mapping[str, Tensor]) -> None:
        """Write ``learning_speed.parquet`` and pictures, and log tables to W&B.

        Args:
            scores: As of `LearningHistory.scores`, by row of the manifest.
        """
        data = cast(ImageDataModule, cast(Any, self.trainer).datamodule)  # set at run time and not declared
        folder = Path(self.trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        table = tabulate_learning(data.manifest, scores)
        write_table(table, folder / _FILE)
        save_picture(self.trainer, draw_learning(table), "learning_speed")
        ordered = table[table["epochs"] > 0].sort_values(_ORDER, kind="stable")
        for name, shown in (("hardest", ordered.head(self.top)), ("easiest", ordered.iloc[::-1].head(self.top))):
            images = load_thumbnails(data, "train", shown["index"].tolist())
            save_picture(self.trainer, draw_extremes(shown, images, name), f"learning_speed_{name}")
            self._upload(name, shown, images)

    def _upload(self, name: str, shown: pd.DataFrame, images: list[Image.Image]) -> None:
        for logger in self.trainer.loggers:
            if isinstance(logger, WandbLogger):
                # The library that the logger speaks to; nothing else here needs it.
                wandb = sys.modules[type(logger.experiment).__module__.partition(".")[0]]
                values = shown.to_numpy(dtype=object).tolist()
                rows = [[wandb.Image(image), *row] for image, row in zip(images, values, strict=True)]
                logger.log_table(f"train/learning_speed_{name}", ["image", *shown], rows)


def tabulate_learning(manifest: Manifest, scores: Mapping[str, Tensor]) -> pd.DataFrame:
    """One row per labeled training sample that the run uses.

    Args:
        manifest: The samples of the run.
        scores: As of `LearningHistory.scores`, by row of the manifest.

    Returns:
        `index`, `path`, `label`, `class`, and the scores; `epochs` is 0 for samples that never came.
    """
    table = manifest.rows("train")[["index", "path", "label", "class"]].reset_index(drop=True)
    rows = table["index"].to_numpy()
    for name, values in scores.items():
        table[name] = values.numpy()[rows]
    return table


@rank_zero_only
def write_epoch(trainer: Trainer, epoch: int, columns: SampleColumns) -> None:
    """Write ``learning_speed/epoch_0000.parquet``, a row per sample that came; the first process only.

    Args:
        trainer: The running trainer.
        epoch: Number of the epoch.
        columns: Of `sample_outcomes`, by row of the manifest.
    """
    folder = Path(trainer.default_root_dir) / _EPOCHS
    folder.mkdir(parents=True, exist_ok=True)
    seen = columns.count.nonzero().squeeze(1)
    table = pd.DataFrame({"index": seen.numpy(), "epoch": epoch})
    for name in OUTCOMES:
        table[name] = columns[name][seen].numpy()
    write_table(table, folder / f"epoch_{epoch:04d}.parquet")


@rank_zero_only
def forget_epochs(trainer: Trainer, first: int) -> None:
    """Clear what an earlier run left in the folder of epochs that are still to come.

    Args:
        trainer: The running trainer.
        first: Number of the first one.
    """
    for path in (Path(trainer.default_root_dir) / _EPOCHS).glob("epoch_*.parquet"):
        if int(path.stem.removeprefix("epoch_")) >= first:
            path.unlink()
