"""Averaged teachers inside a method: followed after every optimizer step, and known to checkpoints."""

from dataclasses import replace
from typing import Any, Literal

from lightning import LightningModule
from torch import Tensor, nn

from lqf_lightning.backbones import Backbone
from lqf_lightning.methods.schedule import scheduled_steps
from lqf_lightning.teachers import EMANTeacher, MomentumSchedule
from lqf_lightning.teachers.momentum import Shape

TeacherName = Literal["eman", "ema", "ema_copied"]
_STATISTICS: dict[str, Any] = {"eman": "averaged", "ema": "batch", "ema_copied": "copied"}


class Averaging(LightningModule):
    """Updates every `EMANTeacher` that is registered as a submodule, once per optimizer step.

    Gradient accumulation therefore moves a student's batch-norm statistics several times per update of its teacher. The
    teacher of step t is the average up to step t - 1. Registering it is all that a method has to do::

        self.teacher = EMANTeacher(self.model, momentum=0.999)
    """

    backbone: Backbone
    head_is_trained = True  # whether the classifier of the backbone itself is what predicts

    @property
    def averaged_teacher(self) -> EMANTeacher | None:
        """The first averaged teacher of this method, if it has one."""
        return next((child for child in self.children() if isinstance(child, EMANTeacher)), None)

    def networks(self) -> dict[str, Backbone]:
        """The plain networks whose weights predict.

        Returns:
            "student", and "teacher" where an averaged teacher follows the network.
        """
        found = {"student": self.backbone}
        teacher = self.averaged_teacher
        if teacher is not None and (network := teacher.copied(self.backbone.model)) is not None:
            found["teacher"] = replace(self.backbone, model=network)
        return found

    @property
    def teacher_predicts(self) -> bool:
        """Whether there is an averaged teacher that tells the classes apart, so that it is evaluated too."""
        teacher = self.averaged_teacher
        return teacher is not None and teacher.copied(self.backbone.model) is teacher.model

    def teacher_logits(self, images: Tensor) -> Tensor:
        """Outputs of the averaged teacher.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Logits (B, C).

        Raises:
            RuntimeError: There is no averaged teacher.
        """
        if self.averaged_teacher is None:
            raise RuntimeError(f"{type(self).__name__} has no averaged teacher. Set method.teacher=eman")
        logits: Tensor = self.averaged_teacher(images)
        return logits

    def on_train_start(self) -> None:
        """Lay momentum schedules out over the run."""
        super().on_train_start()
        for teacher in self._teachers():
            if teacher.momentum.shape != "constant":
                teacher.total_updates = scheduled_steps(self.trainer)

    def optimizer_step(self, *arguments: Any, **options: Any) -> None:
        """Let averaged teachers follow each step of the optimizer."""
        super().optimizer_step(*arguments, **options)
        for teacher in self._teachers():
            teacher.update()

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Say where the plain networks are among the weights of the checkpoint, for those who want them alone."""
        super().on_save_checkpoint(checkpoint)
        places = {module: name for name, module in self.named_modules()}
        # A method may keep its network elsewhere; a checkpoint without this entry is better than none.
        plain = {part: places[net.model] for part, net in self.networks().items() if net.model in places}
        checkpoint["networks"] = {part: f"{place}." for part, place in plain.items()}
        checkpoint["head_is_trained"] = self.head_is_trained

    def _teachers(self) -> list[EMANTeacher]:
        return [module for module in self.modules() if isinstance(module, EMANTeacher)]


def average_of(
    student: nn.Module,
    teacher: TeacherName,
    momentum: float,
    *,
    schedule: Shape = "constant",
    warmup: bool = False,
    sync_statistics: bool = False,
) -> EMANTeacher:
    """Build the averaged teacher that the options of a method describe.

    Args:
        student: The network to follow.
        teacher: "eman" averages batch-norm statistics too; "ema" normalizes by its own batches, "ema_copied" by the
            student's statistics.
        momentum: What the average keeps of itself at every step.
        schedule: "constant", or "cosine", which ends at 1.
        warmup: Whether the first steps keep less.
        sync_statistics: Average the student's statistics over the ranks before they are taken.

    Returns:
        The teacher, a copy of the student as it is.

    Raises:
        ValueError: The name is unknown.
    """
    if teacher not in _STATISTICS:
        raise ValueError(f"`teacher` must be one of {', '.join(_STATISTICS)}, got {teacher!r}. Set method.teacher=eman")
    momentum_schedule = MomentumSchedule(momentum, schedule, warmup)
    return EMANTeacher(student, momentum_schedule, statistics=_STATISTICS[teacher], sync_statistics=sync_statistics)
