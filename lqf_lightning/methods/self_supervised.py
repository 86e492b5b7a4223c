"""Learning features from images alone, by agreeing with an averaged teacher."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self

from torch import Tensor, nn
from torch.nn import functional as F

from lqf_lightning.backbones import Backbone
from lqf_lightning.data import UNLABELED, Batch, Stream
from lqf_lightning.data.stream import ViewsFactory
from lqf_lightning.methods.averaging import TeacherName, average_of
from lqf_lightning.methods.encoder import Encoder, feature_width
from lqf_lightning.methods.frozen_parts import keep_frozen_parts_in_eval
from lqf_lightning.methods.method import NO_DECAY, Method, OptimizerFactory, SchedulerFactory
from lqf_lightning.methods.self_supervised_refusals import refuse_layers
from lqf_lightning.teachers.momentum import Shape


class SelfSupervised(Method):
    """A student that sees one view of an image and a teacher, its running average, that sees the other.

    Subclasses give `pretext`. All training images take part, labeled or not. Labels, where they
    are to be used, train nothing but two linear classifiers on detached features, one of the student and one of the
    teacher, so that every run reports how far its features separate the classes; the head of the network itself stays
    as it was drawn.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, for the linear classifiers.
        optimizer: Builds the optimizer from parameter groups.
        views: Makes a pair of images of each.
        projector: Features (B, F) to projections (B, D).
        scheduler: Builds a per-step schedule; None keeps the rate.
        teacher: "eman"; or "ema" (normalizes by its own batches) or "ema_copied" (by the student's statistics).
        momentum: What the teacher keeps of itself at every step.
        momentum_schedule: "constant", or "cosine", which ends at 1.
        momentum_warmup: Whether the first steps keep less.
        sync_statistics: Average the student's batch-norm statistics over the ranks before the teacher takes them.
        decay_all: Whether the optimizer's weight decay (and the layer-wise rate of LARS) applies to biases and
            parameters of normalization too.
        online_lr: Learning rate of the linear classifiers, on features of length 1.
        layers: Names of the layer groups that train; None means all. The head is never among them.
        group_lr: Learning-rate factor per layer group, 1 where absent; "projector" (and "predictor") are groups too.

    Attributes:
        student: Network and projector.
        teacher: Their average.
    """

    head_is_trained = False
    parts: tuple[str, ...] = ("projector",)  # what trains beside the network

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        optimizer: OptimizerFactory,
        views: ViewsFactory,
        projector: nn.Module,
        scheduler: SchedulerFactory | None,
        teacher: TeacherName,
        momentum: float,
        momentum_schedule: Shape,
        momentum_warmup: bool,
        sync_statistics: bool,
        decay_all: bool,
        online_lr: float,
        layers: Sequence[str] | None,
        group_lr: Mapping[str, float] | None,
    ) -> None:
        body = [group for group in backbone.groups if group != "head"]
        refuse_layers(backbone, layers, group_lr, teacher)
        ours = {name: factor for name, factor in (group_lr or {}).items() if name in self.parts}
        of_network = {name: factor for name, factor in (group_lr or {}).items() if name not in ours}
        super().__init__(
            backbone, classes, optimizer=optimizer, scheduler=scheduler, layers=body if layers is None else layers,
            group_lr=of_network,
        )  # fmt: skip
        self.group_lr |= ours
        self.stream = Stream("all", views)
        self.decay_all, self.online_lr = decay_all, online_lr
        self.student = Encoder(backbone, projector)
        trained = set(self.trained())
        for name, parameter in self.model.named_parameters():
            parameter.requires_grad_(name in trained)
        self.teacher = average_of(
            self.student, teacher, momentum, schedule=momentum_schedule, warmup=momentum_warmup,
            sync_statistics=sync_statistics,
        )  # fmt: skip
        width = feature_width(backbone)
        self.online = nn.ModuleDict({name: nn.Linear(width, len(classes)) for name in ("student", "teacher")})
        self.train()  # backbones come in eval mode

    @property
    def model(self) -> nn.Module:
        """The plain network."""
        return self.backbone.model

    def pretext(self, first: Tensor, second: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Compare what student and teacher make of the views.

        Args:
            first: One view of every image (B, 3, H, W).
            second: The other.
            target: Class positions (B,), -1 where the label is not to be used.

        Returns:
            The loss, averaged over the batch; features of student and of teacher, each (B, F), of either view.

        Raises:
            NotImplementedError: The subclass does not define it.
        """
        raise NotImplementedError(f"{type(self).__name__} must define `pretext`")

    def setup(self, stage: str) -> None:
        """Check that a batch has statistics.

        Args:
            stage: "fit", or another.

        Raises:
            ValueError: A process gets a single image per step.
        """
        super().setup(stage)
        data: Any = getattr(self.trainer, "datamodule", None)
        size = getattr(data, "batch_size", None)
        if stage == "fit" and size is not None and size < 2 * self.trainer.world_size:
            raise ValueError(
                f"data.batch_size={size} gives {self.trainer.world_size} processes less than two images each, which "
                "batch norm needs. Set data.batch_size=256"
            )

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        """One step of optimization on one batch.

        Args:
            batch: Samples of this rank, in two views.
            batch_idx: Unused.

        Returns:
            The objective, and the detached outputs of the student's linear classifier.
        """
        first, second = batch.input
        loss, *features = self.pretext(first, second, batch.target)
        known, number = batch.target != UNLABELED, len(batch.target)
        student, teacher = (
            _classified(linear, f.detach()) for linear, f in zip(self.online.values(), features, strict=True)
        )
        self.train_loss.update(loss.detach(), number)
        right = (student.detach().argmax(-1) == batch.target).sum().double()
        self.train_acc.update(right / known.sum().clamp(min=1), known.sum())
        self.log("train/loss", self.train_loss, on_step=False, on_epoch=True, prog_bar=True)
        self.log("train/acc", self.train_acc, on_step=False, on_epoch=True)
        online = _cross_entropy(student, batch.target) + _cross_entropy(teacher, batch.target)
        return {"loss": loss + online, "logits": student.detach()}

    def forward(self, images: Tensor) -> Tensor:
        """Outputs of the student's linear classifier.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Logits (B, C).
        """
        return _classified(self.online["student"], self.student(images).features)

    @property
    def teacher_predicts(self) -> bool:
        """Its features are classified too."""
        return True

    def teacher_logits(self, images: Tensor) -> Tensor:
        """Outputs of the teacher's linear classifier.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Logits (B, C).
        """
        return _classified(self.online["teacher"], self.teacher(images).features)

    def loss(self, logits: Tensor, target: Tensor) -> Tensor:
        """Cross-entropy of a linear classifier, for evaluation.

        Args:
            logits: Outputs (B, C).
            target: Class positions (B,).

        Returns:
            A scalar, averaged over the batch.
        """
        return F.cross_entropy(logits, target)

    def groups(self) -> Iterator[dict[str, Any]]:
        """Layer groups, projector and predictor; biases and normalization apart where they do not decay.

        Yields:
            Parameter groups as optimizers take them.
        """
        yield from (part for group in super().groups() for part in self._parts(group))
        for name in self.parts:
            module = self.student.projector if name == "projector" else getattr(self, name)
            yield from self._parts({"params": list(module.parameters()), "name": name})
        yield {"params": list(self.online.parameters()), "name": "online", "lr": self.online_lr, "weight_decay": 0.0}

    def _parts(self, group: dict[str, Any]) -> Iterator[dict[str, Any]]:
        if self.decay_all:
            yield group
            return
        lines = [parameter for parameter in group["params"] if parameter.ndim <= 1]
        others = [parameter for parameter in group["params"] if parameter.ndim > 1]
        yield from [{**group, "params": others}] if others else []
        yield from [{"params": lines, "name": f"{group['name']}{NO_DECAY}", "weight_decay": 0.0}] if lines else []

    def train(self, mode: bool = True) -> Self:
        """Switch to training mode, except for what is frozen.

        Args:
            mode: Training (True) or evaluation.

        Returns:
            The method itself.
        """
        super().train(mode)
        if mode:
            keep_frozen_parts_in_eval(self.model)
        return self


def _classified(linear: Any, features: Tensor) -> Tensor:
    # In a run in half precision, the features of a teacher are in single precision.
    logits: Tensor = linear(F.normalize(features).type_as(linear.weight))
    return logits


def _cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    # A batch without labels has no mean.
    total = F.cross_entropy(logits, target, ignore_index=UNLABELED, reduction="sum")
    return total / (target != UNLABELED).sum().clamp(min=1)
