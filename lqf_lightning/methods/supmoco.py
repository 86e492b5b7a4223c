"""Supervised momentum contrast: images of one class are to be close, whether they are one image or not."""

from collections.abc import Mapping, Sequence
from typing import get_args

from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.data.stream import ViewsFactory
from lqf_lightning.methods.averaging import TeacherName
from lqf_lightning.methods.method import OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.moco import MoCo
from lqf_lightning.teachers.contrast import SameClass, supervised_info_nce
from lqf_lightning.teachers.momentum import Shape


class SupMoCo(MoCo):
    """Momentum contrast that uses the labels there are (after Majumder et al., 2021, arXiv 2101.11058).

    The queue remembers the class of every key. What keys of the query's class are is a choice: further positives, or
    no negatives. Images without a label are told from all others, as in `MoCo`.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names.
        optimizer: Builds the optimizer from parameter groups.
        views: Makes a pair of images of each.
        scheduler: Builds a per-step schedule; None keeps the rate.
        same_class: What keys of the same class are: "positive", or "ignored".
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
        ValueError: `same_class` has another name.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        views: ViewsFactory,
        scheduler: SchedulerFactory | None = None,
        same_class: SameClass = "positive",
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
        if same_class not in get_args(SameClass):
            raise ValueError(
                f"`same_class` must be one of {', '.join(get_args(SameClass))}, got {same_class!r}. "
                "Set method.same_class=positive"
            )
        super().__init__(
            backbone, classes, optimizer=optimizer, views=views, scheduler=scheduler, queue_size=queue_size,
            temperature=temperature, projection_width=projection_width, hidden_width=hidden_width, teacher=teacher,
            momentum=momentum, momentum_schedule=momentum_schedule, momentum_warmup=momentum_warmup,
            sync_statistics=sync_statistics, decay_all=decay_all, online_lr=online_lr, layers=layers, group_lr=group_lr,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "views"], logger=False)
        self.same_class = same_class

    def contrast(self, query: Tensor, key: Tensor, target: Tensor) -> Tensor:
        """The loss.

        Args:
            query: Unit vectors of the student (B, D).
            key: Unit vectors of the teacher (B, D).
            target: Class positions (B,), -1 where the label is not to be used.

        Returns:
            A scalar, averaged over the batch.
        """
        return supervised_info_nce(query, key, target, *self.queue.known(), self.temperature, self.same_class)
