"""Ordinary (nonlinear) fine-tuning, the baseline of every comparison."""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.data import Batch
from lqf_lightning.methods.averaging import TeacherName, average_of
from lqf_lightning.methods.frozen_parts import keep_frozen_parts_in_eval
from lqf_lightning.methods.losses import LossName, choose_loss
from lqf_lightning.methods.method import Method, OptimizerFactory, SchedulerFactory
from lqf_lightning.teachers.momentum import Shape


class Finetune(Method):
    """Trains the weights of the network themselves; a linear probe is the case ``layers=[head]``.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, in the order of the outputs.
        optimizer: Builds the optimizer from parameter groups.
        scheduler: Builds a per-step schedule; None keeps the rate.
        loss: "cross_entropy" or "squared".
        target_scale: Value of the right class in the squared loss.
        batch_norm: "train" uses batch statistics and updates the running ones, "frozen" keeps the running statistics
            of pre-training. Layer groups that do not train are always frozen.
        teacher: Also keep and evaluate a running average of the network: "eman", or "ema_copied" (normalizes by the
            network's statistics); None: none.
        momentum: What the average keeps of itself at every step.
        momentum_schedule: "constant", or "cosine", which ends at 1.
        momentum_warmup: Whether the first steps keep less.
        sync_statistics: Average the network's batch-norm statistics over the ranks before the average takes them.
        layers: Names of the layer groups that train; None means all.
        group_lr: Learning-rate factor per layer group, 1 where absent.

    Raises:
        ValueError: `batch_norm` has another name, or contradicts `teacher`.
    """

    weighs_samples = True
    asks_teacher = False  # whether training needs the answers of an averaged teacher

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        scheduler: SchedulerFactory | None = None,
        loss: LossName = "cross_entropy",
        target_scale: float = 15.0,
        batch_norm: Literal["train", "frozen"] = "train",
        teacher: TeacherName | None = None,
        momentum: float = 0.999,
        momentum_schedule: Shape = "constant",
        momentum_warmup: bool = True,
        sync_statistics: bool = False,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(backbone, classes, optimizer=optimizer, scheduler=scheduler, layers=layers, group_lr=group_lr)
        if batch_norm not in ("train", "frozen"):
            raise ValueError(
                f"`batch_norm` must be 'train' or 'frozen', got {batch_norm!r}. Set method.batch_norm=train"
            )
        if teacher == "ema" and (batch_norm == "frozen" or layers is not None):
            raise ValueError(
                "a teacher that normalizes by its own batches (teacher=ema) cannot follow a network that keeps running "
                f"statistics (batch_norm={batch_norm}, layers={layers}). Set method.teacher=eman, or "
                "method.batch_norm=train and method.layers=null"
            )
        if teacher == "ema" and not self.asks_teacher:
            raise ValueError(
                f"{type(self).__name__} evaluates its teacher and never asks it in training, so that teacher=ema would "
                "have no batches to normalize by. Set method.teacher=eman or ema_copied"
            )
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "reference", "views"], logger=False)
        self.batch_norm = batch_norm
        self._loss = choose_loss(loss, target_scale)
        self.model = backbone.model
        trained = self.trained()
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        if teacher is not None:
            self.teacher = average_of(
                self.model, teacher, momentum, schedule=momentum_schedule, warmup=momentum_warmup,
                sync_statistics=sync_statistics,
            )  # fmt: skip
        self.train()  # backbones come in eval mode, and Lightning trains every module in the mode it finds it in

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of the network.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Logits (B, C).

        Raises:
            ValueError: Batch statistics of a single value are asked for.
        """
        try:
            logits: Tensor = self.model(images)
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            raise ValueError(
                f"a training batch of {len(images)} image on a process leaves one value per channel, which has no "
                "variance for batch norm. Set data.drop_last=true, another data.batch_size, or method.batch_norm=frozen"
            ) from error
        return logits

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """The chosen loss.

        Args:
            logits: Outputs (B, C).
            target: Class positions (B,).

        Returns:
            A scalar, averaged over the batch.
        """
        return self._loss(logits, target)

    def training_loss(self, logits: Tensor, batch: Batch) -> Tensor:
        """The chosen loss, with the sample weights of the data where there are any.

        Args:
            logits: Outputs (B, C), B at least 1.
            batch: The samples that they belong to.

        Returns:
            A scalar, averaged over the batch.
        """
        weight = self.weights_of(batch.index)
        return self.loss(logits, batch.target) if weight is None else self._loss(logits, batch.target, weight=weight)

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, except for the parts that are frozen.

        Args:
            mode: Training (True) or evaluation.

        Returns:
            The method itself.
        """
        super().train(mode)
        if mode:
            keep_frozen_parts_in_eval(self.model, self.batch_norm == "frozen")
        return self
