"""Focal distillation whose old model is the running average of the network itself."""

import difflib
import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lqf_lightning.backbones import Backbone
from lqf_lightning.methods.averaging import average_of
from lqf_lightning.methods.focal_distillation import FocalDistillation
from lqf_lightning.teachers import SharedClasses
from lqf_lightning.teachers.momentum import Shape


class SelfDistillation(FocalDistillation):
    """Stays close to its own EMAN average, most where that is right; an example of a method with an EMAN teacher.

    The average takes the place of `FocalDistillation`'s reference; it is evaluated too, as ``val/teacher_acc``.

    Args:
        backbone: The network, its head and its layer groups.
        classes: Class names, in the order of the outputs.
        momentum: What the teacher keeps of itself at every step.
        momentum_schedule: "constant", or "cosine", which ends at 1.
        momentum_warmup: Whether the first steps keep less.
        sync_statistics: Average the student's batch-norm statistics over the ranks before the teacher takes them.
        **options: Those of `FocalDistillation`, except `reference` and `influence`.

    Raises:
        ValueError: `reference` or `influence` is given, or an option is unknown.
    """

    def __init__(
        self,
        backbone: Backbone,
        classes: Sequence[str],
        *,
        momentum: float = 0.999,
        momentum_schedule: Shape = "constant",
        momentum_warmup: bool = True,
        sync_statistics: bool = False,
        **options: Any,
    ) -> None:
        _refuse_unknown(options)
        for name in ("reference", "influence"):
            if options.get(name):
                raise ValueError(
                    f"self-distillation learns from its own average and takes no `{name}`, got {options[name]}. Set "
                    f"method.{name}=null, or method=focal_distillation"
                )
        super().__init__(backbone, classes, **options)
        self.teacher = average_of(
            self.model, "eman", momentum, schedule=momentum_schedule, warmup=momentum_warmup,
            sync_statistics=sync_statistics,
        )  # fmt: skip

    def match_classes(self) -> SharedClasses:
        """The average knows what the network knows.

        Returns:
            All classes.
        """
        return SharedClasses(self.classes, self.classes)

    def answers(self, images: Tensor) -> Tensor:
        """What the average makes of images.

        Args:
            images: Normalized images (B, 3, H, W).

        Returns:
            Outputs (B, C), detached.
        """
        return self.teacher_logits(images)


def _refuse_unknown(options: Mapping[str, Any]) -> None:
    parameters = [*inspect.signature(SelfDistillation).parameters, *inspect.signature(FocalDistillation).parameters]
    known = [name for name in dict.fromkeys(parameters) if name not in ("backbone", "classes", "options", "reference")]
    for name in options:
        if name not in (*known, "reference"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `method.{near[0]}`? " if near else ""
            raise ValueError(f"`method.{name}` is no option of SelfDistillation. {hint}Its options: {known}")
