"""What every training sample tells: unique information, exact leave-one-out and suspected label errors."""

import logging
import shutil
from pathlib import Path
from typing import Any, Literal, cast

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from lqf_lightning.analysis import RunProblem, problem_of_run, score_samples
from lqf_lightning.analysis.finished import LooksBack
from lqf_lightning.analysis.group_scores import group_positions, score_groups
from lqf_lightning.analysis.influence_now import influence_now
from lqf_lightning.analysis.linear_twin import training_time
from lqf_lightning.analysis.run_problem import KernelChoice
from lqf_lightning.data import ImageDataModule
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.schedule import scheduled_steps
from lqf_lightning.progress import track

from .sample_checks import refuse_options, refuse_run
from .sample_record import FILE, SampleRecord

log = logging.getLogger(__name__)
_LARGEST, _LARGEST_IN_TIME = 20_000, 2000  # samples times outputs of an exact kernel; a finite time costs 40 times more


class SampleInformation(Callback, LooksBack):
    """Writes ``sample_information.parquet``: one row per training sample, from the run's linear-quadratic problem.

    For `lqf` this is the problem that the run solves. For `finetune` it is the expansion of the network at its
    pre-trained weights, trained for as long as the run: a model of the run, labeled so. Both are known before the first
    step, and nothing is trained; once a fine-tuning run ends, a local influence at its weights is added, which is
    approximate and not leave-one-out, because those weights have seen every label. Exact where the kernel is ("full"):
    the same for any number of ranks and batches. Images are seen without augmentation.

    Args:
        time: "optimum": training has converged; a number: it stops when learning rate times steps, in the mean form of
            the loss, have reached it; "auto": the optimum for `lqf`; for `finetune` the learning rates of the run if it
            takes SGD (momentum at its final effect; decay and `method.group_lr` left out), else the time that
            leave-one-out prefers. At a finite time the bias of the head is trained like other weights for `finetune`,
            and is at its optimum throughout for `lqf`.
        kernel: "full" (exact), "trace" or "last_layer" (which rank samples roughly, and cost less), or "auto": exact
            up to 20,000 samples times classes, at a finite time 2,000, else the trace.
        combinations: Random combinations of outputs that stand for all in a trace; None: all outputs.
        sigma: Deviation of the noise that smooths weights and outputs; information falls with its square.
        temperature: Of Langevin dynamics, see `score_samples`.
        learning_rate: Of the stationary noise of SGD; None: a tenth of the largest stable one.
        validation: Whether outputs on the validation images are watched (F-SI); their labels play no part.
        groups: "class", or a Parquet file with the columns `index` and `group`: groups that are removed as a whole.
        influence: Whether a fine-tuning run ends with a local influence.
        top: Samples at each end that pictures and tables show.
        memory_gib: Memory for what a kernel is assembled from, in GiB.
        chunk_size: Images per pass of a rank; None: those of an evaluation batch.

    Attributes:
        written: Whether the scores have been written.
    """

    def __init__(
        self,
        time: float | Literal["auto", "optimum"] = "auto",
        kernel: KernelChoice = "auto",
        combinations: int | None = 4,
        sigma: float = 1.0,
        temperature: float = 1.0,
        learning_rate: float | None = None,
        validation: bool = True,
        groups: str | None = None,
        influence: bool = True,
        top: int = 16,
        memory_gib: float = 4.0,
        chunk_size: int | None = None,
    ) -> None:
        refuse_options(
            time, kernel, groups, combinations=combinations, sigma=sigma, temperature=temperature, top=top,
            learning_rate=learning_rate, memory_gib=memory_gib, chunk_size=chunk_size,
        )  # fmt: skip
        self.time, self.kernel, self.combinations = time, kernel, combinations
        self.learning_rate, self.sigma, self.temperature = learning_rate, sigma, temperature
        self.validation, self.groups = validation, groups
        self.influence, self.top, self.memory_gib, self.chunk_size = influence, top, memory_gib, chunk_size
        self.written = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse a run whose samples cannot be scored, before the first batch."""
        if stage == "fit" or self.steps is not None:
            refuse_run(trainer, pl_module, self.groups, self.time)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score all samples; what a fine-tuning run is resumed without is not made up for."""
        if self.written:
            return
        if trainer.ckpt_path and not isinstance(pl_module, LQF):
            _say_that_it_is_late(Path(trainer.default_root_dir) / FILE)
            return
        self.write(trainer, cast(Method, pl_module))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the local influence of a fine-tuning run."""
        if self.influence and not isinstance(pl_module, LQF):
            self.add_influence(trainer, cast(Method, pl_module))

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the samples of a finished run."""
        if self.steps is not None:
            self._score_finished(trainer, cast(Method, pl_module))

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Score the samples of a finished run that has no validation images."""
        if self.steps is not None:
            self._score_finished(trainer, cast(Method, pl_module))

    def _score_finished(self, trainer: Trainer, method: Method) -> None:
        with torch.inference_mode(False):
            self.write(trainer, method)
            if self.influence and not isinstance(method, LQF):
                self.add_influence(trainer, method)

    def write(self, trainer: Trainer, method: Method) -> None:
        """Score all samples now; all ranks have to call this together.

        Args:
            trainer: The running trainer.
            method: Its method.
        """
        folder = Path(trainer.default_root_dir)
        kept = folder / "sample_information_kernel"  # finished parts, for a run that is killed and started again
        twin = isinstance(method, LQF)
        finite = self.time != "optimum" and (self.time != "auto" or not twin)
        run = self._problem(
            method,
            largest=_LARGEST_IN_TIME if finite else _LARGEST,
            folder=kept,
            intercept=not finite,  # a run that stops early has not brought the bias of its head to the optimum either
        )
        time = self._time(method, run) if finite else None
        scores = score_samples(
            run if time is None or twin else run.nearly_free(),
            time=time,
            sigma=self.sigma,
            temperature=self.temperature,
            learning_rate=self.learning_rate,
            batch_size=cast(ImageDataModule, cast(Any, trainer).datamodule).batch_size,
            watch=lambda items: track(items, "leave-one-out"),
        )
        record = SampleRecord(trainer, self.top)
        record.write(scores)
        if self.groups is not None:
            groups = group_positions(self.groups, run, cast(Any, trainer).datamodule.manifest)
            record.write_groups(score_groups(run, groups, self.sigma, lambda items: track(items, "groups")))
        self.written = True
        trainer.strategy.barrier("sample_information")
        if trainer.is_global_zero:
            shutil.rmtree(kept, ignore_errors=True)

    def add_influence(self, trainer: Trainer, method: Method) -> None:
        """Add the local influence at the present weights to the table; all ranks have to call this together.

        Args:
            trainer: The running trainer.
            method: Its method, trained.
        """
        found = influence_now(
            method, combinations=self.combinations, memory_gib=self.memory_gib, chunk_size=self.chunk_size
        )
        SampleRecord(trainer, self.top).add_influence(*found)

    def state_dict(self) -> dict[str, Any]:
        """Remember that the scores are written.

        Returns:
            A flag.
        """
        return {"written": self.written}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take it back: a resumed run does not score again."""
        self.written = bool(state_dict["written"])

    def _problem(self, method: Method, *, folder: Path, **options: Any) -> RunProblem:
        try:
            return problem_of_run(
                method,
                form=self.kernel,
                combinations=self.combinations,
                memory_gib=self.memory_gib,
                chunk_size=self.chunk_size,
                folder=folder,
                validation=self.validation,
                start=self.start,
                **options,
            )
        except ValueError as error:
            if "which is another kernel" not in str(error):
                raise
            raise ValueError(
                f"{folder} holds parts of the kernel of another run, killed before it was complete: its samples, "
                "weights or options were others. Remove the folder, or set hydra.run.dir to a new one"
            ) from error

    def _time(self, method: Method, run: RunProblem) -> float:
        if not isinstance(self.time, str):
            return float(self.time)
        time = training_time(method, *(self.steps or (scheduled_steps(method.trainer),)))
        if time is None:
            time = run.problem.samples / run.problem.ridge  # early stopping and a ridge weigh directions alike
            log.info("time=%.4g: one over the ridge of the best leave-one-out accuracy", time)
        else:
            log.info("time=%.4g: learning rates times steps of the run", time)
            if method.group_lr:
                log.warning("method.group_lr=%s is left out: all layers are taken at the same rate", method.group_lr)
        return time


@rank_zero_only
def _say_that_it_is_late(file: Path) -> None:
    log.warning(
        "no sample information: the run was resumed without it, and its weights are no longer the pre-trained ones. "
        "Run lqf-score checkpoint=%s/checkpoints/last.ckpt",
        file.parent,
    )
