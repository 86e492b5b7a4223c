"""Bootstrap your own latent: predicting what a teacher makes of the other view of an image."""

from collections.abc import Mapping, Sequence

from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.data.stream import ViewsFactory
from lqf_lightning.methods.averaging import TeacherName
from lqf_lightning.methods.encoder import feature_width, two_layers
from lqf_lightning.methods.method import OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.self_supervised import SelfSupervised
from lqf_lightning.teachers.agreement import byol_regression
from lqf_lightning.teachers.momentum import Shape


class BYOL(SelfSupervised):
    """Bootstrap your own latent (Grill et al., NeurIPS 2020) whose teacher is EMAN (Cai et al., CVPR 2021).

    The student predicts, by a further small network, the teacher's projection of the other view; both directions are
    added. There are no negatives: the predictor, which the teacher has not, keeps the features from collapsing.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, for the linear classifiers.
        optimizer: Builds the optimizer from parameter groups.
        views: Makes a pair of images of each.
        scheduler: Builds a per-step schedule; None keeps the rate.
        projection_width: Length of a projection.
        hidden_width: Hidden layer of projector and predictor.
        teacher: "eman", "ema" or "ema_copied".
        momentum: What the teacher keeps of itself at every step.
        momentum_schedule: "constant", or "cosine", which ends at 1.
        momentum_warmup: Whether the first steps keep less.
        sync_statistics: Average the student's batch-norm statistics over the ranks before the teacher takes them.
        decay_all: Whether weight decay applies to biases and parameters of normalization too.
        online_lr: Learning rate of the linear classifiers.
        layers: Names of the layer groups that train; None means all.
        group_lr: Learning-rate factor per layer group, 1 where absent.
    """

    parts = ("projector", "predictor")

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        views: ViewsFactory,
        scheduler: SchedulerFactory | None = None,
        projection_width: int = 256,
        hidden_width: int = 4096,
        teacher: TeacherName = "eman",
        momentum: float = 0.98,
        momentum_schedule: Shape = "cosine",
        momentum_warmup: bool = False,
        sync_statistics: bool = False,
        decay_all: bool = False,
        online_lr: float = 1.0,
        layers: Sequence[str] | None = None,
        group_lr: Mapping[str, float] | None = None,
    ) -> None:
        super().__init__(
            backbone, classes, optimizer=optimizer, views=views, scheduler=scheduler,
            projector=two_layers(feature_width(backbone), hidden_width, projection_width, batch_norm=True),
            teacher=teacher, momentum=momentum, momentum_schedule=momentum_schedule, momentum_warmup=momentum_warmup,
            sync_statistics=sync_statistics, decay_all=decay_all, online_lr=online_lr, layers=layers, group_lr=group_lr,
        )  # fmt: skip
        self.save_hyperparameters(ignore=["backbone", "optimizer", "scheduler", "views"], logger=False)
        self.predictor = two_layers(projection_width, hidden_width, projection_width, batch_norm=True)

    def pretext(self, first: Tensor, second: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Predict the teacher's projection of each view from the other view.

        Args:
            first: One view of every image (B, 3, H, W).
            second: The other.
            target: Not used: classes play no part.

        Returns:
            The loss, between 0 and 8; features of student and teacher (B, F).
        """
        students = [self.student(view) for view in (first, second)]
        teachers = [self.teacher(view) for view in (first, second)]
        loss = sum(
            (
                byol_regression(self.predictor(student.projection), teacher.projection)
                for student, teacher in zip(students, reversed(teachers), strict=True)
            ),
            start=first.new_zeros(()),
        )
        return loss, students[0].features, teachers[0].features
