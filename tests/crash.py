"""Callbacks that break a run on purpose."""

from lightning import Callback


class CrashAtEpoch(Callback):
    """Raises at the start of an epoch, on every rank or on one."""

    def __init__(self, epoch: int, rank: int | None = None) -> None:
        self.epoch, self.rank = epoch, rank

    def on_train_epoch_start(self, trainer, pl_module):
        if trainer.current_epoch == self.epoch and self.rank in (None, trainer.global_rank):
            raise RuntimeError("pulled the plug")
