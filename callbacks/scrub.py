"""Training samples taken out of a trained model, with a certificate and read-outs."""

import copy
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lqf_lightning.analysis.answer_request import Answered, AnswerRequest
from lqf_lightning.analysis.release_noise import NoiseKind
from lqf_lightning.analysis.scrub_options import ScrubOptions
from lqf_lightning.analysis.scrubs_model import ScrubsModel
from lqf_lightning.analysis.training_time_report import write_report
from lqf_lightning.analysis.with_buffers import with_buffers
from lqf_lightning.analysis.with_weights import with_weights
from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.data.copies import refuse_copies
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.leaking_start import refuse_seen

log = logging.getLogger(__name__)


class Scrub(Callback, ScrubsModel):
    """Removes a cohort of training samples from the model when a run ends, or from that of a finished run.

    In a training it leaves the run as it is, and adds ``checkpoints/scrubbed.ckpt`` and ``scrub.json``: an experiment,
    since everything else in the folder still knows the samples. `lqf-forget` does the same for a finished run, writes
    certificate and report, and deletes what is left of the samples.

    Args:
        cohort: See `Cohort.parse`.
        name: See `ScrubOptions`, like all that follow.
        tolerance: Relative gradient to reach.
        distance: Bound on the distance from the optimum to reach instead.
        max_steps: Most steps of conjugate gradients.
        noise: Of the released weights.
        sigma: Its deviation.
        noise_seed: Of its draw, for experiments.
        retrain: Whether to retrain from zero, to compare with.
        retrained: Checkpoint to compare with instead.
        queries: Test images whose answers are searched for information.
        relearn: Whether the models learn the samples again.
        shadows: Models of the likelihood-ratio attack.
        memory_gib: Memory for what a kernel is assembled from.
        options: Of a scrub of `finetune`.
    """

    def __init__(
        self,
        cohort: Any,
        name: str = "auto",
        tolerance: float | None = None,
        distance: float | None = None,
        max_steps: int = 200,
        noise: NoiseKind = "auto",
        sigma: float = 1e-3,
        noise_seed: int | None = None,
        retrain: bool | Literal["auto"] = "auto",
        retrained: str | None = None,
        queries: int = 16,
        relearn: bool = True,
        shadows: int = 32,
        memory_gib: float = 4.0,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        self.cohort = cohort
        self.options = ScrubOptions(
            name, tolerance, distance, max_steps, noise, sigma, noise_seed, retrain, retrained, queries, relearn,
            shadows, memory_gib, dict(options or {}),
        )  # fmt: skip

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a cohort or a method that nothing can be done about, before the first batch."""
        refuse_copies(_data(trainer), "scrubs")
        if self.chosen is None:
            self.chosen = Cohort.parse(self.cohort, _data(trainer).manifest)
        refuse_seen(_data(trainer), "certificates of forgetting", self.chosen.indices)
        self.options.refuse_other_model(isinstance(pl_module, LQF), type(pl_module).__name__)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep the network as it is before training, for scrubs that start there."""
        if self.start is None and not isinstance(pl_module, LQF):
            self.start = copy.deepcopy(cast(Method, pl_module).backbone)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scrub the trained model, and keep the result beside it."""
        method, data = cast(Method, pl_module), _data(trainer)
        with data.manifest_restored():
            answered = self.answer(trainer, method)
        folder = Path(trainer.default_root_dir)
        with with_weights(method, answered.released), with_buffers(method.backbone.model, answered.buffers):
            trainer.save_checkpoint(folder / "checkpoints" / "scrubbed.ckpt", weights_only=True)
        rank_zero_only(write_report)(folder / "scrub.json", answered.report)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scrub the model of a finished run."""
        if self.steps is not None:
            self.answer(trainer, cast(Method, pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Scrub the model of a finished run that has no validation images."""
        if self.steps is not None:
            self.answer(trainer, cast(Method, pl_module))

    def answer(self, trainer: Trainer, method: Method) -> Answered:
        """Answer the request now; all ranks have to call this together.

        Args:
            trainer: The running trainer.
            method: Its method, at its trained weights.

        Returns:
            The outcome, also kept as `answered`.

        Raises:
            RuntimeError: `setup` has not run.
        """
        if self.chosen is None:
            raise RuntimeError("the callback has not been set up by a trainer")
        request = AnswerRequest(method, _data(trainer), self.chosen, self.options, start=self.start, kernel=self.kernel)
        self.answered = request.run()
        _log_numbers(trainer, self.answered.report)
        if self.complete is not None and trainer.is_global_zero:
            self.complete(self.answered)
        trainer.strategy.barrier("scrub")
        return self.answered


def _data(trainer: Trainer) -> ImageDataModule:
    return cast(ImageDataModule, cast(Any, trainer).datamodule)


def _log_numbers(trainer: Trainer, report: Mapping[str, Any]) -> None:
    bound, scrub, read = report["bound"], report["scrub"], report["read_outs"] or {"models": {}}
    numbers = {"forget/nats": bound["nats"], "forget/passes": scrub["passes"], "forget/seconds": scrub["seconds"]}
    numbers |= {
        f"forget/{name}": scrub[name] for name in ("distance_bound", "verified_relative_gradient", "weight_change")
    }
    for model, values in read["models"].items():
        numbers |= {f"forget/{model}_{key}": value for key, value in values.items() if isinstance(value, (int, float))}
    known = {name: float(value) for name, value in numbers.items() if value is not None}
    for logger in trainer.loggers:
        logger.log_metrics(known, step=trainer.global_step)
    if trainer.is_global_zero:
        shown = [name for name in known if name.count("_") < 3 and "relearn" not in name and "_loss" not in name]
        log.info("scrub: %s", ", ".join(f"{name.removeprefix('forget/')}={known[name]:.4g}" for name in shown))
