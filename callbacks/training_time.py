"""How long training will take, foretold before its first step and held against what it took."""

import logging
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import torch
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from lqf_lightning.analysis.predictable import left_out, refuse_unpredictable, tell_what_is_not_modeled
from lqf_lightning.analysis.training_forecast import ForecastKernel, forecast_training
from lqf_lightning.analysis.training_time_picture import draw_training_time
from lqf_lightning.analysis.training_time_report import compare_with, median_error, predicted_rows, write_report
from lqf_lightning.linear import current_reducer
from lqf_lightning.linear.training_time import FRACTIONS, refuse_fractions
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.schedule import scheduled_steps

from .pictures import save_picture

log = logging.getLogger(__name__)
_HOPELESS = 10.0  # times the loss before training


class TrainingTime(Callback):
    """Predicts the loss of every step from the kernel, and reports ``train/predicted_loss`` beside ``train/loss``.

    When training starts, the network's expansion is trained in function space: with the learning rates, momentum, decay
    and batches of the run, but without the network. Thresholds are fractions of the loss before training; a threshold
    counts as reached at the first step from which on the loss, averaged over an epoch, stays at or below it. For
    ``lqf`` without augmentation the prediction is exact up to rounding; for fine-tuning it is that of the linearized
    network. Writes ``training_time.json`` and ``pictures/training_time.png`` at the start, and again at the end with
    the measured steps, their relative errors and the seconds of both.

    Args:
        thresholds: Fractions of the loss before training, in (0, 1).
        kernel: "full", "trace" (a surrogate that leaves couplings of outputs out), or "auto": full up to `largest`
            samples times outputs.
        largest: See there.
        memory_gib: Memory for what the kernel is assembled from, in GiB.

    Attributes:
        report: What the file holds, on rank 0 and from the start of training on.

    Raises:
        ValueError: A threshold or an option is out of range.
    """

    def __init__(
        self,
        thresholds: Sequence[float] = FRACTIONS,
        kernel: ForecastKernel = "auto",
        largest: int = 8000,
        memory_gib: float = 4.0,
    ) -> None:
        refuse_fractions(thresholds)
        if kernel not in ("auto", "full", "trace"):
            raise ValueError(
                f"`kernel` must be auto, full or trace, got {kernel!r}. Set callbacks.training_time.kernel=auto"
            )
        for name, value, usual in (("largest", largest, 8000), ("memory_gib", memory_gib, 4)):
            if not 0 < value < math.inf:
                raise ValueError(f"`{name}` must be positive, got {value}. Set callbacks.training_time.{name}={usual}")
        self.thresholds, self.kernel, self.largest, self.memory_gib = list(thresholds), kernel, largest, memory_gib
        self.report: dict[str, Any] = {}
        self._predicted = torch.zeros(0)
        self._measured: list[Tensor] = []
        self._numbers: list[Tensor] = []  # of samples, by step
        self._spent, self._began = 0.0, 0.0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run that cannot be predicted."""
        if stage == "fit":
            refuse_unpredictable(cast(Method, pl_module), trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Predict the run, unless a resumed one has its prediction.

        Raises:
            ValueError: The run is resumed without one, or with other steps.
        """
        if self.report:
            self._refuse_other_steps(trainer)
            # What a checkpoint held lies on the processor.
            self._measured = [loss.to(pl_module.device) for loss in self._measured]
            self._numbers = [number.to(pl_module.device) for number in self._numbers]
            return
        if trainer.global_step:
            raise ValueError(
                f"training time is predicted from the first step on, and this run goes on from step "
                f"{trainer.global_step}. Set ckpt_path=null, or leave the callback training_time out"
            )
        method = cast(Method, pl_module)
        tell_what_is_not_modeled(method, trainer)
        forecast = forecast_training(method, form=self.kernel, largest=self.largest, memory_gib=self.memory_gib)
        started = time.monotonic()
        curve = forecast.curve()
        self._predicted = curve.batch_loss.cpu()
        initial, rates = float(curve.loss[0]), forecast.rule
        self.report = {
            "method": type(method).__name__, "samples": len(forecast.initial), "steps": rates.steps,
            "steps_per_epoch": forecast.epoch, "kernel": forecast.kernel.form, "effective_time": rates.time,
            "initial_loss": initial, "final_loss": float(curve.loss[-1]), "final_error": float(curve.error[-1]),
            "thresholds": predicted_rows(self._predicted, initial, self.thresholds, forecast.epoch),
            "seconds": {"kernel": forecast.seconds, "prediction": time.monotonic() - started},
            "left_out": left_out(method, trainer),
        }  # fmt: skip
        self._tell_divergence(method, initial)
        self._show(trainer)

    def _refuse_other_steps(self, trainer: Trainer) -> None:
        # Learning rates are those of the checkpoint anyhow.
        now = {"steps": scheduled_steps(trainer), "steps_per_epoch": int(trainer.num_training_batches)}
        told = {name: self.report[name] for name in now}
        if now != told:
            raise ValueError(
                f"training time has been predicted for {told}, and the resumed run has {now}. Set trainer.max_epochs "
                "and data.batch_size as they were, or leave the callback training_time out"
            )

    def _tell_divergence(self, method: Method, initial: float) -> None:
        final = self.report["final_loss"]
        if math.isfinite(final) and final <= _HOPELESS * initial:
            return
        advice = (
            f"training is predicted to diverge, from a loss of {initial:.3g} to {final:.3g}. Set method.optimizer.lr "
            "lower, or data.batch_size higher"
        )
        if isinstance(method, LQF) and self.report["kernel"] == "full":
            raise ValueError(advice)
        log.warning("%s", advice)  # networks may bend where their expansion does not

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Begin to count the seconds of a step."""
        self._began = time.monotonic()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the loss of the step, over all ranks."""
        loss = cast(Method, pl_module).training_loss(outputs["logits"], batch).detach().double()
        number = len(batch.target)
        total = current_reducer().sum_(torch.stack([loss * number, loss.new_tensor(number)]))
        self._measured.append(total[0] / total[1])
        self._numbers.append(total[1])
        self._spent += time.monotonic() - self._began

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Report the loss that was predicted for the epoch."""
        start = trainer.current_epoch * int(self.report["steps_per_epoch"])
        part = self._predicted[start : len(self._measured)]
        if len(part):
            number = torch.stack(self._numbers[start : start + len(part)]).cpu()
            mean = float((part * number).sum() / number.sum())  # of samples, as train/loss is
            # The same on every rank; sync_dist silences Lightning's advice.
            pl_module.log("train/predicted_loss", mean, sync_dist=True, batch_size=1)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Hold the prediction against what has been measured."""
        measured, epoch = self._curve(), int(self.report["steps_per_epoch"])
        rows = compare_with(self.report["thresholds"], measured, epoch)
        self.report["thresholds"], error = rows, median_error(rows)
        self.report["median_relative_error"] = error
        self.report["seconds"] |= {"training": self._spent, "per_step": self._spent / max(1, len(measured))}
        for row in rows:
            if row["predicted_steps"] is not None:
                row["predicted_seconds"] = row["predicted_steps"] * self.report["seconds"]["per_step"]
        if trainer.is_global_zero and error is not None:
            for logger in trainer.loggers:
                logger.log_metrics({"train/predicted_time_error": error}, step=trainer.global_step)
        self._show(trainer)

    def _show(self, trainer: Trainer) -> None:
        if not trainer.is_global_zero:
            return
        write_report(Path(trainer.default_root_dir) / "training_time.json", self.report)
        for row in self.report["thresholds"]:
            log.info(
                "%g of the initial loss: predicted %s steps, measured %s",
                row["fraction"], row["predicted_steps"], row.get("measured_steps", "none yet"),
            )  # fmt: skip
        exact = self.report["method"] == "LQF" and self.report["kernel"] == "full"
        note = "training time of the linear model" if exact else "training time, predicted by a linear model"
        if missing := self.report.get("left_out"):
            note = f"{note}; {' and '.join(missing)} left out"
        rows, epoch = self.report["thresholds"], int(self.report["steps_per_epoch"])
        save_picture(trainer, draw_training_time(self._predicted, rows, epoch, self._curve(), note), "training_time")

    def _curve(self) -> Tensor:
        return torch.stack(self._measured).cpu() if self._measured else torch.zeros(0, dtype=torch.float64)

    def state_dict(self) -> dict[str, Any]:
        """Keep prediction and measurements.

        Returns:
            Tensors and plain values.
        """
        number = torch.stack(self._numbers).cpu() if self._numbers else torch.zeros(0)
        return {
            "report": self.report,
            "predicted": self._predicted,
            "measured": self._curve(),
            "numbers": number,
            "spent": self._spent,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take those of the interrupted run."""
        self.report, self._predicted, self._spent = state_dict["report"], state_dict["predicted"], state_dict["spent"]
        self._measured, self._numbers = list(state_dict["measured"]), list(state_dict["numbers"])
