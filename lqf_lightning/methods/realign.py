"""Bringing a network whose activations were swapped back to what it computed before."""

import copy
from dataclasses import replace
from typing import Any, Literal, Self

import torch
from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.backbones.activations import swap_activations
from lqf_lightning.backbones.blended_activation import blend_activations
from lqf_lightning.backbones.group_features import group_features
from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.congruence.reestimate_batch_norm import reestimate_batch_norm
from lqf_lightning.data import Batch
from lqf_lightning.linear.reducer import current_reducer
from lqf_lightning.methods.alignment_gap import AlignmentGap
from lqf_lightning.methods.alignment_loss import AlignmentLoss
from lqf_lightning.methods.batch_inputs import BatchInputs
from lqf_lightning.methods.divergence import refuse_divergence
from lqf_lightning.methods.frozen_parts import keep_frozen_parts_in_eval
from lqf_lightning.methods.method import OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.realign_refusals import refuse_options, refuse_other_student, refuse_small_batches
from lqf_lightning.methods.run_state import RunState
from lqf_lightning.methods.sample_mean import SampleMean
from lqf_lightning.methods.schedule import scheduled_steps


class Realign(RunState):
    """Distills a network into its copy with leaky activations, on images without labels (see `AlignmentLoss`).

    The head stays as published, and targets are never read. The activations go over to the leaky ones step by step, so
    that the student, which begins as the original, is never far from it; without that (``anneal=0``) batch-norm
    statistics can be estimated anew for the swapped network before the first step.

    Args:
        original: The network with its published head.
        head_is_published: Whether the head came with the weights; one that was drawn has no say.
        slope: Of the leaky activations.
        optimizer: Builds the optimizer from parameter groups.
        scheduler: Builds a per-step schedule; None keeps the rate.
        anneal: Share of the steps in which the activations go from the original's to the leaky ones.
        batch_norm: "frozen" keeps the statistics, "train" normalizes by the batch in training, and moves them.
        statistics_passes: Passes over images to estimate the swapped network's batch-norm statistics; 0 keeps those of
            the original at the start.
        feature_weight: Weight of the features that enter the head.
        group_weight: Weight of what leaves the layer groups before.
        logit_weight: Weight of the outputs' divergence, 0 without a published head.
        temperature: Of the outputs' softmax.

    Attributes:
        student: The leaky network.
        gaps: Figures of the leaky network by stage: "swapped" as it is, "statistics" after a new estimate of these.
    """

    def __init__(
        self,
        original: Backbone,
        *,
        head_is_published: bool,
        slope: float,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        anneal: float = 0.5,
        batch_norm: Literal["train", "frozen"] = "frozen",
        statistics_passes: int = 0,
        feature_weight: float = 1.0,
        group_weight: float = 1.0,
        logit_weight: float = 1.0,
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        logit_weight = logit_weight if head_is_published else 0.0
        weights = {"feature_weight": feature_weight, "group_weight": group_weight, "logit_weight": logit_weight}
        refuse_options(batch_norm, statistics_passes, anneal, weights, temperature)
        self.original = original
        self.student = replace(original, model=copy.deepcopy(original.model))
        swap_activations(self.student.model, slope)
        self._mixtures = blend_activations(original.model, self.student.model) if anneal else []
        self.original_model, self.model = original.model.eval().requires_grad_(False), self.student.model
        self.model.requires_grad_(True)
        self.model.get_submodule(original.head).requires_grad_(False)
        self.head_is_published, self.slope, self.batch_norm = head_is_published, slope, batch_norm
        self.anneal, self.statistics_passes = anneal, statistics_passes
        self._loss = AlignmentLoss(**weights, temperature=temperature)
        self.make_optimizer, self.make_schedule = optimizer, scheduler
        self.moves_buffers = batch_norm == "train"
        self.gaps: dict[str, dict[str, float]] = {}
        *_, self._last, self._head = original.groups
        self.train_loss = SampleMean()
        width = self.model.get_submodule(original.head).get_parameter("weight").shape[1]
        self.gap = AlignmentGap(width, head=head_is_published)
        self.train()

    def setup(self, stage: str) -> None:
        """Check that a batch has a spread.

        Args:
            stage: "fit", or another.
        """
        super().setup(stage)
        if stage == "fit":
            refuse_small_batches(self._data, self.trainer.world_size)

    @property
    def _data(self) -> Any:
        return self.trainer.datamodule  # type: ignore[attr-defined]  # the trainer has it, its type does not say so

    def loss(self, images: Tensor) -> Tensor:
        """How far the student is from the original.

        Args:
            images: Normalized images (B, 3, H, W), at least two.

        Returns:
            A scalar.
        """
        with torch.no_grad():
            expected = group_features(self.original, images)
        return self._loss(group_features(self.student, images), expected)

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        """One step of optimization on one batch.

        Args:
            batch: Images of this rank; targets are not looked at.
            batch_idx: Unused.

        Returns:
            The objective.
        """
        loss = self.loss(batch.input)
        self.train_loss.update(loss.detach(), len(batch.input))
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        return loss

    def on_train_epoch_end(self) -> None:
        """Stop a run whose loss is no longer a number, on all ranks alike."""
        refuse_divergence(self.trainer.callback_metrics["train/loss"], self.current_epoch, self.trainer.optimizers[0])

    def on_fit_start(self) -> None:
        """Measure the swapped network, estimate its statistics, and measure it again; once, before the first step."""
        super().on_fit_start()
        if self.gaps:
            return  # resumed
        self.gaps["swapped"] = self.measure()
        if self.statistics_passes:
            self.reestimate()
            self.gaps["statistics"] = self.measure()

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Let the activations be a step nearer to the leaky ones.

        Args:
            batch: Unused.
            batch_idx: Unused.
        """
        total = self.anneal * scheduled_steps(self.trainer)
        for mixture in self._mixtures:
            mixture.share = min(1.0, (self.global_step + 1) / total)

    def on_validation_start(self) -> None:
        """Judge the leaky network, however far its activations are on their way."""
        super().on_validation_start()
        for mixture in self._mixtures:
            mixture.share = 1.0

    def validation_step(self, batch: Batch, batch_idx: int) -> None:
        """Compare the networks on one batch.

        Args:
            batch: Images of this rank, possibly none.
            batch_idx: Unused.
        """
        self._compare(batch.input)

    def on_validation_epoch_end(self) -> None:
        """Report ``val/feature_error`` and ``val/agreement``."""
        figures = self.gap.compute()  # reduced over ranks here
        self.gap.reset()
        # Equal on all ranks by now; this silences Lightning's advice.
        self.log_dict({f"val/{name}": value for name, value in figures.items()}, sync_dist=True)

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Compare the networks as they stand on the held-out images of the trainer's data.

        Returns:
            `feature_error`, and with a published head `agreement`.
        """
        with evaluation_mode(self.model):
            for batch in self._data.val_dataloader():
                self._compare(batch.input.to(self.device))
        figures = {name: float(value) for name, value in self.gap.compute().items()}
        self.gap.reset()
        return figures

    def reestimate(self) -> None:
        """Estimate the student's batch-norm statistics on training images, as they would be evaluated."""
        batches = BatchInputs(self._data.statistics_dataloader())
        reestimate_batch_norm(self.model, batches, passes=self.statistics_passes, reducer=current_reducer())

    def _compare(self, images: Tensor) -> None:
        if len(images):  # a rank without samples takes part in the reductions all the same
            found, expected = (group_features(network, images) for network in (self.student, self.original))
            last, head = self._last, self._head
            self.gap.update(found[last], expected[last], found[head], expected[head])

    def configure_optimizers(self) -> Any:
        """One group of all parameters but the head's.

        Returns:
            What Lightning expects: an optimizer, with its per-step schedule where there is one.
        """
        trained = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        optimizer = self.make_optimizer([{"params": trained, "name": "body"}])
        if self.make_schedule is None:
            return optimizer
        scheduler = self.make_schedule(optimizer, scheduled_steps(self.trainer))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, except for what is frozen.

        Args:
            mode: Training (True) or evaluation.

        Returns:
            The method itself.
        """
        super().train(mode)
        self.original_model.eval()
        if mode:
            keep_frozen_parts_in_eval(self.model, self.batch_norm == "frozen")
        return self

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep what was measured before the first step."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["realign"] = {"gaps": self.gaps, "slope": self.slope, "weights": self.original.weights}

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take it back, if it is of the same student."""
        super().on_load_checkpoint(checkpoint)
        refuse_other_student(checkpoint.get("realign"), self.slope, self.original.weights)
        self.gaps = dict(checkpoint["realign"]["gaps"])
