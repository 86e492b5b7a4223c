"""Momentum contrast: telling the other view of an image from a queue of other images."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from lqf_lightning.backbones import Backbone
from lqf_lightning.data.stream import ViewsFactory
from lqf_lightning.methods.averaging import TeacherName
from lqf_lightning.methods.encoder import feature_width, two_layers
from lqf_lightning.methods.method import OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.self_supervised import SelfSupervised
from lqf_lightning.teachers.contrast import info_nce
from lqf_lightning.teachers.key_queue import KeyQueue
from lqf_lightning.teachers.momentum import Shape

log = logging.getLogger(__name__)


class MoCo(SelfSupervised):
    """Momentum contrast (He et al., CVPR 2020; v2: Chen et al., 2020) whose teacher is EMAN (Cai et al., CVPR 2021).

    The student's projection of one view has to find the teacher's projection of the other one among K keys of earlier
    batches of all ranks; until there are K, among as many as there are. The teacher has to be slow, as keys of
    different age are compared: at a momentum of .9 training is known to suffer (He et al., section 4.1). An EMAN
    teacher lets no image see the others of its batch, so keys need not be shuffled over ranks. With ``teacher=ema``
    they would have to be, which is not done here: batch statistics then give pairs away.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, for the linear classifiers.
        optimizer: Builds the optimizer from parameter groups.
        views: Makes a pair of images of each.
        scheduler: Builds a per-step schedule; None keeps the rate.
        queue_size: Number of keys K, a multiple of the batch size.
        temperature: What similarities are divided by.
        projection_width: Length of a key.
        hidden_width: Hidden layer of the projector; None: as wide as the features.
        teacher: "eman", "ema" or "ema_copied".
        momentum: What the teacher keeps of itself at every step.
        momentum_schedule: "constant", or "cosine", which ends at 1.
        momentum_warmup: Whether the first steps keep less.
        sync_statistics: Average the student's batch-norm statistics over the ranks before the teacher takes them.
        decay_all: Whether weight decay applies to biases and parameters of normalization too.
        online_lr: Learning rate of the linear classifiers.
        layers: Names of the layer groups that train; None means all.
        group_lr: Learning-rate factor per layer group, 1 where absent.

    Raises:
        ValueError: The temperature is not positive.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        views: ViewsFactory,
        scheduler: SchedulerFactory | None = None,
        queue_size: int = 65536,
        temperature: float = 0.2,
        projection_width: int = 128,
        hidden_width: int | None = None,
        teacher: TeacherName = "eman",
        momentum: float = 0.999,
        momentum_schedule: Shape = "constant",
        momentum_warmup: bool = False,
        sync_statistics: bool = False,
        decay_all: bool = True,
        online_lr: float = 1.0,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
    ) -> None:
        if not temperature > 0:
            raise ValueError(f"`temperature` must be positive, got {temperature}. Set method.temperature=0.2")
        width = feature_width(backbone)
        hidden = width if hidden_width is None else hidden_width
        super().__init__(
            backbone, classes, optimizer=optimizer, views=views, scheduler=scheduler,
            projector=two_layers(width, hidden, projection_width, batch_norm=False), teacher=teacher,
            momentum=momentum, momentum_schedule=momentum_schedule, momentum_warmup=momentum_warmup,
            sync_statistics=sync_statistics, decay_all=decay_all, online_lr=online_lr, layers=layers, group_lr=group_lr,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "views"], logger=False)
        self.temperature = temperature
        self.queue = KeyQueue(queue_size, projection_width)
        # Equal on all ranks by construction; DDP would send it at every step.
        self._ddp_params_and_buffers_to_ignore = [f"queue.{name}" for name in KeyQueue.BUFFERS]

    def setup(self, stage: str) -> None:
        """Check that batches fill the queue without remainder.

        Args:
            stage: "fit", or another.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        if stage == "fit" and hasattr(data, "batch_size"):
            self.queue.refuse_batch(data.batch_size)
        if stage == "fit" and hasattr(data, "manifest"):
            images, size = len(data.manifest.training_rows()), len(self.queue.keys)
            if size > images and self.trainer.is_global_zero:
                log.warning(
                    "a queue of %d keys is longer than an epoch of %d images, so that older keys of an image are among "
                    "those that it is told from. Set method.queue_size=%d or less",
                    size, images, max(images // data.batch_size, 1) * data.batch_size,
                )  # fmt: skip

    def pretext(self, first: Tensor, second: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Contrast the student's first view with the teacher's second one and the queue, which then takes the keys in.

        Args:
            first: One view of every image (B, 3, H, W).
            second: The other.
            target: Class positions (B,), -1 where the label is not to be used.

        Returns:
            The loss; features of student and teacher (B, F).
        """
        student, teacher = self.student(first), self.teacher(second)
        query, key = F.normalize(student.projection), F.normalize(teacher.projection)
        loss = self.contrast(query, key, target)
        self.queue.enqueue(key, target)
        return loss, student.features, teacher.features

    def contrast(self, query: Tensor, key: Tensor, target: Tensor) -> Tensor:
        """The loss; here without regard to classes.

        Args:
            query: Unit vectors of the student (B, D).
            key: Unit vectors of the teacher (B, D).
            target: Class positions (B,), -1 where the label is not to be used.

        Returns:
            A scalar, averaged over the batch.
        """
        return info_nce(query, key, self.queue.known()[0], self.temperature)
