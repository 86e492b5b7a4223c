"""Few labels and many images without: learning from the labels that a teacher is sure of."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.data import Batch, Stream
from lqf_lightning.data.stream import ViewsFactory
from lqf_lightning.methods.averaging import TeacherName
from lqf_lightning.methods.finetune import Finetune
from lqf_lightning.methods.method import OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.sample_mean import SampleMean
from lqf_lightning.teachers.momentum import Shape
from lqf_lightning.teachers.pseudo_labels import pseudo_label_loss, pseudo_labels


class FixMatch(Finetune):
    r"""FixMatch (Sohn et al., NeurIPS 2020) whose labels come from an EMAN teacher (Cai et al., CVPR 2021).

    .. math:: \frac1B \sum_i CE(z_i, y_i)
        + \lambda\, \frac{1}{\mu B} \sum_j 1[\max p_j \ge \tau]\, CE(z_j, \arg\max p_j)

    The teacher sees a weakly augmented view of each unlabeled image and guesses p; the student sees a strongly
    augmented one. The sum over unlabeled images is divided by the number of all of them. The student's batch norms see
    labeled and strong images together. An epoch is one pass over all training images; labeled ones come as often as
    needed.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, in the order of the outputs.
        optimizer: Builds the optimizer from parameter groups.
        views: Makes a weak and a strong view of each unlabeled image.
        scheduler: Builds a per-step schedule; None keeps the rate.
        threshold: Confidence tau from which a guess is learned from.
        unlabeled_weight: lambda.
        unlabeled_ratio: mu, unlabeled images per labeled one in a step.
        teacher: "eman"; "ema" (normalizes by its own batches), "ema_copied" (by the student's statistics), or None: the
            student itself guesses, in one batch with labeled and strong images.
        momentum: What the teacher keeps of itself at every step.
        momentum_schedule: "constant", or "cosine", which ends at 1.
        momentum_warmup: Whether the first steps keep less.
        sync_statistics: Average the student's batch-norm statistics over the ranks before the teacher takes them.
        batch_norm: "train" or "frozen".
        layers: Names of the layer groups that train; None means all.
        group_lr: Learning-rate factor per layer group, 1 where absent.

    Raises:
        ValueError: A number is out of range.
    """

    asks_teacher = True
    weighs_samples = False

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        views: ViewsFactory,
        scheduler: SchedulerFactory | None = None,
        threshold: float = 0.7,
        unlabeled_weight: float = 10.0,
        unlabeled_ratio: int = 5,
        teacher: TeacherName | None = "eman",
        momentum: float = 0.999,
        momentum_schedule: Shape = "constant",
        momentum_warmup: bool = True,
        sync_statistics: bool = False,
        batch_norm: Literal["train", "frozen"] = "train",
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
    ) -> None:
        for name, value, least, example in (
            ("threshold", threshold, 0, 0.7), ("unlabeled_weight", unlabeled_weight, 0, 10),
            ("unlabeled_ratio", unlabeled_ratio, 1, 5),
        ):  # fmt: skip
            if not least <= value < float("inf"):
                raise ValueError(
                    f"`{name}` must be at least {least} and finite, got {value}. Set method.{name}={example}"
                )
        if unlabeled_ratio % 1:
            raise ValueError(
                f"`unlabeled_ratio` must be a whole number, got {unlabeled_ratio}. Set method.unlabeled_ratio=5"
            )
        super().__init__(
            backbone, classes, optimizer=optimizer, scheduler=scheduler, teacher=teacher, momentum=momentum,
            momentum_schedule=momentum_schedule, momentum_warmup=momentum_warmup, sync_statistics=sync_statistics,
            batch_norm=batch_norm, layers=layers, group_lr=group_lr,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "views"], logger=False)
        self.stream = Stream("both", views, unlabeled_ratio)
        self.threshold, self.unlabeled_weight = threshold, unlabeled_weight
        self.train_unlabeled_loss, self.train_selected = SampleMean(), SampleMean()

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """One step of optimization.

        Args:
            batch: A batch of labeled samples, and one of unlabeled samples in two views.
            batch_idx: Unused.

        Returns:
            The objective, and the detached outputs on labeled samples.
        """
        labeled: Batch = batch["labeled"]
        weak, strong = batch["unlabeled"].input
        logits, weak_logits, strong_logits = self._outputs(labeled.input, weak, strong)
        label, selected = pseudo_labels(weak_logits, self.threshold)
        unlabeled = pseudo_label_loss(strong_logits, label, selected)
        self.train_unlabeled_loss.update(unlabeled.detach(), len(weak))
        self.train_selected.update(selected.double().mean(), len(weak))
        self.log("train/unlabeled_loss", self.train_unlabeled_loss, on_step=False, on_epoch=True)
        self.log("train/selected", self.train_selected, on_step=False, on_epoch=True)
        noted = self.note_training(logits, labeled)
        return noted | {"loss": noted["loss"] + self.unlabeled_weight * unlabeled}

    def _outputs(self, labeled: Tensor, weak: Tensor, strong: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        number = len(labeled)
        if self.averaged_teacher is None:
            together = self(torch.cat([labeled, weak, strong]))
            logits, weak_logits, strong_logits = together.split([number, len(weak), len(strong)])
            return logits, weak_logits.detach(), strong_logits
        weak_logits = self.teacher_logits(weak)
        together = self(torch.cat([labeled, strong]))
        return together[:number], weak_logits, together[number:]
