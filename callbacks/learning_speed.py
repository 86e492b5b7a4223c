"""How soon and how lastingly each training sample is learned, from the passes that training makes anyway."""

from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from lqf_lightning.data import UNLABELED, Batch
from lqf_lightning.data.sample_ledger import SampleLedger
from lqf_lightning.information.learning_speed import LearningHistory
from lqf_lightning.information.sample_outcomes import OUTCOMES, sample_outcomes

from .learning_record import LearningRecord, forget_epochs, write_epoch
from .sample_pass import data_and_method, note_samples


class LearningSpeed(Callback):
    """Writes ``learning_speed.parquet``: cumulative correctness and confidence, forgetting events and more per sample.

    Low cumulative correctness marks mislabeled and atypical samples (a proxy of the C-score, Jiang et al. 2021). Every
    batch notes what the network said before its optimizer step, with the augmentation and the modes of training; a
    sample that comes twice in an epoch counts once. With `evaluate`, every epoch ends with a pass over all training
    images as they are evaluated instead. The result is the same on any number of ranks that train the same weights, and
    in a run that was interrupted. Pictures and, in W&B, a table show the hardest and the easiest samples.

    Args:
        evaluate: Look at the network at the end of an epoch, without augmentation, at the cost of a forward pass.
        per_epoch: Also write the columns of every epoch, ``learning_speed/epoch_0000.parquet`` and so on.
        top: How many of the hardest and of the easiest samples are shown.

    Raises:
        ValueError: `top` is below 1, or not whole.
    """

    def __init__(self, evaluate: bool = False, per_epoch: bool = False, top: int = 24) -> None:
        if not isinstance(top, int) or top < 1:
            raise ValueError(f"`top` must be whole and at least 1, got {top}. Set callbacks.learning_speed.top=24")
        self.evaluate, self.per_epoch, self.top = evaluate, per_epoch, top
        self._history = LearningHistory(0)
        self._ledger = SampleLedger(0, OUTCOMES)
        self._kept: Mapping[str, Any] = {}
        self._epoch, self._open, self._written = 0, False, False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Start over with a fit, until its checkpoint, if it has one, is read."""
        if stage != "fit":
            return
        data, _ = data_and_method(trainer, pl_module)
        self._history = LearningHistory(len(data.manifest))
        self._kept, self._epoch, self._open, self._written = {}, 0, False, False

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the state until the fit starts."""
        self._kept = state_dict

    def state_dict(self) -> dict[str, Any]:
        """All that was noted, of all ranks; Lightning asks every rank, also those that write no checkpoint.

        Returns:
            Tensors and plain values.
        """
        ledger = self._ledger.state() if self._open else None
        return {"epoch": self._epoch, "ledger": ledger, "history": self._history.state()}

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the state of the checkpoint back."""
        data, method = data_and_method(trainer, pl_module)
        self._ledger = SampleLedger(len(data.manifest), OUTCOMES, method.device)
        if self._kept:
            self._history.restore(self._kept["history"])
            self._epoch, self._open = self._kept["epoch"], self._kept["ledger"] is not None
            if self._open:
                self._ledger.restore(self._kept["ledger"])
        self._kept = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Clear the files of epochs that are still to come."""
        forget_epochs(trainer, trainer.current_epoch)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the last epoch, where the checkpoint was written before its end was."""
        if self._open and self._epoch != trainer.current_epoch:
            self._close(trainer, pl_module)
        self._epoch = trainer.current_epoch

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note what the network said on the batch."""
        self._open = True
        logits = outputs.get("logits") if isinstance(outputs, Mapping) else None
        if self.evaluate or logits is None:  # a sweep of an exact solver may not know them yet
            return
        labeled: Batch = batch["labeled"] if isinstance(batch, Mapping) else batch
        index, target = labeled.index, labeled.target
        if data_and_method(trainer, pl_module)[1].stream.samples == "all":  # some may have no label
            known = target != UNLABELED
            logits, index, target = logits[known], index[known], target[known]
        self._ledger.add(index, **sample_outcomes(logits, target))

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch to the history."""
        if self._open:
            self._close(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores."""
        if self._open:  # training was stopped within an epoch
            self._close(trainer, pl_module)
        self._write(trainer)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the scores of a run that was complete already and had nothing left to train."""
        self._write(trainer)

    def _close(self, trainer: Trainer, module: LightningModule) -> None:
        data, method = data_and_method(trainer, module)
        if self.evaluate:
            note_samples(self._ledger, trainer, method, data.fixed_train_dataloader(), "learning speed")
        columns = self._ledger.reduce().to("cpu")
        if not columns.count.any():
            raise ValueError(
                f"{type(method).__name__} returned no `logits` beside labeled samples from any training step of epoch "
                f"{self._epoch}. Set callbacks.learning_speed.evaluate=true"
            )
        self._history.observe(self._epoch, columns.columns)
        if self.per_epoch:
            write_epoch(trainer, self._epoch, columns)
        self._ledger.clear()
        self._open = False

    def _write(self, trainer: Trainer) -> None:
        if not self._written and not self._history.empty and trainer.is_global_zero:
            LearningRecord(trainer, self.top).write(self._history.scores())
        self._written = True
