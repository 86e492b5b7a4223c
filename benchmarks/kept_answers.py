"""A callback that keeps what a model answers on every test image, so that models can be compared image by image."""

from pathlib import Path
from typing import Any

import pandas as pd
import torch
from lightning import Callback, LightningModule, Trainer

from lqf_lightning.data import Batch


class KeptAnswers(Callback):
    """Writes ``answers.parquet``: `index`, `label` and `prediction` of the test images, in one process."""

    def __init__(self) -> None:
        self.rows: list[torch.Tensor] = []

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Batch, batch_idx: int, *_: int
    ) -> None:
        """Keep a batch."""
        self.rows.append(torch.stack([batch.index, batch.target, outputs["logits"].argmax(-1)], 1).cpu())

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the table."""
        table = pd.DataFrame(torch.cat(self.rows).numpy(), columns=["index", "label", "prediction"])
        table.sort_values("index").to_parquet(Path(trainer.default_root_dir) / "answers.parquet", index=False)
