"""What one run of a sweep over random subsets gets right, in its subset and outside of it."""

import logging
from pathlib import Path

import torch
from lightning import Callback, LightningModule, Trainer

from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.sample_ledger import SampleColumns, SampleLedger
from lqf_lightning.methods.leaking_start import mark_seen

from .sample_pass import data_and_method, note_samples

log = logging.getLogger(__name__)
_FILE = "memorization_run.parquet"
_COLUMNS = ("correct", "confidence")


class Memorization(Callback):
    """Writes ``memorization_run.parquet`` at the end of a fit: which samples the run gets right, used by it or not.

    Many such runs tell what is memorized, and which training sample decides about which test sample (Feldman and Zhang
    2020): ``lqf-train -m data.subset_ratio=0.7 'data.subset_seed=range(200)' callbacks=[memorization]``, and then
    ``lqf-score runs=multirun/DIR``. The network is the one that training ends with. It costs one pass over all samples
    of all splits, as they are evaluated, and is exact on any number of ranks.
    """

    def __init__(self) -> None:
        self._written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that leaves nothing out.

        Raises:
            ValueError: It is trained on all samples.
        """
        self._written = False
        if stage == "fit" and (ratio := data_and_method(trainer, pl_module)[0].plan.subset_ratio) >= 1:
            raise ValueError(
                "memorization compares runs that were trained on a sample with runs that were not, and "
                f"data.subset_ratio={ratio:g} leaves none out. Set data.subset_ratio=0.7, and sweep over "
                "'data.subset_seed=range(200)' with -m"
            )
        if stage == "fit":
            data = data_and_method(trainer, pl_module)[0]
            asked = torch.from_numpy(data.manifest.labeled_rows()["index"].to_numpy(copy=True))
            mark_seen(data, "memorization scores", asked)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate all samples and write."""
        data, method = data_and_method(trainer, pl_module)
        ledger = SampleLedger(len(data.manifest), _COLUMNS, method.device)
        loaders = {"train": data.every_train_dataloader(), "val": data.val_dataloader()}
        if data.test_split == "test":
            loaders["test"] = data.test_dataloader()
        for split, loader in loaders.items():
            note_samples(ledger, trainer, method, loader, f"memorization: {split}")
        found = ledger.reduce().to("cpu")
        if trainer.is_global_zero:
            write_run(Path(trainer.default_root_dir), data, found)
        self._written = True

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what a run lacks that was complete already, and had nothing left to train."""
        path = Path(trainer.default_root_dir) / _FILE
        if trainer.is_global_zero and not self._written and not path.exists():
            log.warning("nothing was left to train, and there is no %s. Set ckpt_path=null to start over", path)


def write_run(folder: Path, data: ImageDataModule, found: SampleColumns) -> None:
    """Write a row per sample that was evaluated.

    Args:
        folder: The run folder.
        data: The data.
        found: `correct` and `confidence` (of the label) by row of the manifest.
    """
    seen = found.count.nonzero().squeeze(1).numpy()
    table = data.manifest.table.loc[seen, ["index", "split", "used"]].reset_index(drop=True)
    if data.seen_by_weights is not None:
        table["seen_by_weights"] = data.seen_by_weights.numpy()[seen]
    table["correct"] = (found["correct"] > 0.5).numpy()[seen]
    table["confidence"] = found["confidence"].numpy()[seen]
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / f"{_FILE}.partial"  # a sweep may be read while it runs
    table.to_parquet(partial, index=False)
    partial.replace(folder / _FILE)
