"""What an upgrade breaks: samples that the model in use gets right and the model of this run gets wrong."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor

from lqf_lightning.congruence.flip_counts import FlipTally
from lqf_lightning.data.answers import answers
from lqf_lightning.linear import current_reducer
from lqf_lightning.teachers import Reference, StoredPredictions

from .flip_checks import (
    check_options,
    data_of,
    doubts,
    foresee_the_test,
    refuse_strangers,
    say_that_nothing_is_validated,
)
from .flip_rates import count_flips, named_rates
from .flip_record import FlipRecord, forget_record

log = logging.getLogger(__name__)


class NegativeFlips(Callback):
    """Compares every evaluation with the model in use: ``val/nfr`` and its relatives, tables and pictures of flips.

    The old model predicts once, before the first batch, as its own evaluation would: in its own image size, crop and
    normalization. Classes are matched by name. Samples of classes that the old model does not know are left out of all
    of the metrics, `error` and `nfr` included, which are thus over the shared classes only, unlike ``val/acc``; their
    number is ``val/flips_unshared``, and a warning names the classes. The metrics are `nfr`, `pfr`, `relative_nfr`,
    `nfi`, `pfi`, `error_old` and `error`, NaN where they are not defined; the same for the test. Another warning says
    how many of the evaluated images the old model was trained on, where its run folder tells.

    After training (for its last validation) and after a test, the run folder gets ``negative_flips_val.parquet`` (every
    flip), ``negative_flips.json`` (rates with intervals, classes, and the epoch or checkpoint that they are of) and two
    pictures; W&B gets them as tables.

    Args:
        reference: The model in use.
        references: Several, by name; their metrics are ``val/nfr/NAME``.
        cache_dir: Folder that keeps predictions of old models for other runs; None: they are not kept.
        max_images: How many flips are shown, the most confident mistakes first.
    """

    def __init__(
        self,
        reference: Reference | None = None,
        references: Mapping[str, Reference] | None = None,
        *,
        cache_dir: str | Path | None = None,
        max_images: int = 32,
    ) -> None:
        check_options(reference, references, max_images)
        self.references = ({} if reference is None else {"": reference}) | dict(references or {})
        self.cache_dir, self.max_images = cache_dir, max_images
        self._old: dict[str, StoredPredictions] = {}
        self._seen: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
        self._tallies: dict[str, FlipTally] = {}
        self._epoch = 0  # of the last report
        self._told: set[str] = set()

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the old model predict the validation set."""
        data = data_of(trainer)
        if trainer.ckpt_path is None:
            forget_record(trainer)
        if len(data.manifest.rows("val")) and trainer.limit_val_batches:
            self._prepare(trainer, pl_module, "val")
        else:
            refuse_strangers(self.references, pl_module)
            say_that_nothing_is_validated()
        foresee_the_test(data, self.references)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to look; outside of training, let the old model predict first."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._prepare(trainer, pl_module, "val")
        self._seen = []

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let the old model predict the test set, and begin to look."""
        self._prepare(trainer, pl_module, data_of(trainer).test_split)
        self._seen = []

    def _prepare(self, trainer: Trainer, module: LightningModule, split: str) -> None:
        data = data_of(trainer)
        refuse_strangers(self.references, module)
        for doubt in doubts(data, self.references, split) if trainer.is_global_zero else ():
            if doubt not in self._told:
                log.warning(doubt)
            self._told.add(doubt)
        for name, reference in self.references.items():
            self._old[name] = answers(data, reference, split, module.device, self.cache_dir)

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Note predictions, without waiting for the device."""
        logits = outputs["logits"].detach().float()
        self._seen.append((batch.index, batch.target, logits.argmax(-1), logits.softmax(-1).amax(-1)))

    def on_test_batch_end(self, *arguments: Any) -> None:
        """Note predictions, without waiting for the device."""
        self.on_validation_batch_end(*arguments)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the rates."""
        self._report(trainer, pl_module, "val")

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the rates."""
        self._report(trainer, pl_module, "test")

    def _report(self, trainer: Trainer, module: LightningModule, stage: str) -> None:
        if trainer.sanity_checking:
            return
        self._epoch = trainer.current_epoch
        index, target, prediction, _ = (torch.cat(column) for column in zip(*self._seen, strict=True))
        for name, old in self._old.items():
            tally = self._tallies[name] = count_flips(module, old, index, target, prediction)
            for key, value in named_rates(tally, stage, name).items():
                module.log(key, value, sync_dist=True)  # equal on all ranks by now; this silences Lightning's advice

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the last validation."""
        self._write(trainer, "val", "val")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down a validation of its own."""
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._write(trainer, "val", "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write down the test."""
        self._write(trainer, "test", data_of(trainer).test_split)

    def _write(self, trainer: Trainer, stage: str, split: str) -> None:
        if not self._tallies:
            return  # a resumed run may have had nothing left to do
        index, _, prediction, confidence = (torch.cat(column) for column in zip(*self._seen, strict=True))
        columns = torch.stack([prediction.float(), confidence], 1)  # class positions are exact in single precision
        columns, index = current_reducer().gather_rows(columns, index)
        model: dict[str, Any] = {"epoch": self._epoch}
        if trainer.state.fn != TrainerFn.FITTING:
            model = {"checkpoint": None if trainer.ckpt_path is None else _short(trainer)}
        for name, tally in self._tallies.items() if trainer.is_global_zero else ():
            record = FlipRecord(trainer, stage, split, name, self.max_images, model)
            record.write(self._old[name], tally, index.cpu(), columns[:, 0].long().cpu(), columns[:, 1].cpu())
        self._seen, self._tallies = [], {}


def _short(trainer: Trainer) -> str:
    # A run folder may be moved: what lies in it is named from there.
    path, folder = Path(str(trainer.ckpt_path)), Path(trainer.default_root_dir)
    return str(path.relative_to(folder) if path.is_relative_to(folder) else path)
