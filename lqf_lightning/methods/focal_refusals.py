"""Options and references that focal distillation cannot work with, told before anything is computed."""

import math
from typing import Any, get_args

from torch import nn

from lqf_lightning.backbones import Backbone
from lqf_lightning.congruence.distances import ClassReduction
from lqf_lightning.congruence.focal_filter import FilterName
from lqf_lightning.congruence.mixing import Mixing
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, Reference, SharedClasses, StoredPredictions

_DISTANCES = ("logits", "kl", "ldi", "none")
_FIX = "Set reference=RUN/checkpoints/best.ckpt"


def refuse_options(options: Any) -> None:
    """Check the options of `FocalDistillation`.

    Args:
        options: Its hyper-parameters.

    Raises:
        ValueError: A name is unknown, a number is out of range, or nothing would be distilled.
    """
    for name, known in (
        ("distance", _DISTANCES),
        ("filter", get_args(FilterName)),
        ("class_reduction", get_args(ClassReduction)),
        ("mixing", get_args(Mixing)),
    ):
        if options[name] not in known:
            raise ValueError(
                f"`{name}` must be one of {', '.join(known)}, got {options[name]!r}. Set method.{name}={known[0]}"
            )
    for name, least, example in (
        ("alpha", 0, 1), ("beta", 0, 5), ("strength", 0, 1), ("margin", 0, 0), ("influence", 0, 0), ("power", 1, 2),
    ):  # fmt: skip
        if not least <= options[name] < math.inf:
            raise ValueError(
                f"`{name}` must be at least {least} and finite, got {options[name]}. Set method.{name}={example}"
            )
    if not 0 < options.temperature < math.inf:
        raise ValueError(
            f"`temperature` must be positive and finite, got {options.temperature}. Set method.temperature=100"
        )
    if not 0 <= options.distillation_share <= 1:
        raise ValueError(
            f"`distillation_share` must be between 0 and 1, got {options.distillation_share}. Set "
            "method.distillation_share=0.9"
        )
    if options.alpha == options.beta == 0 and options.distance != "none":
        raise ValueError(
            "with alpha=0 and beta=0 every sample has weight 0, so that nothing would be distilled. Set method.beta=5, "
            "or method=finetune"
        )
    if options.top_k is not None and options.top_k < 1:
        raise ValueError(
            f"`top_k` must be null (all classes) or at least 1, got {options.top_k}. Set method.top_k=null"
        )


def usable(reference: Reference | None) -> FrozenTeacher | EnsembleTeacher:
    """Check that there is a model to learn from.

    Args:
        reference: What was given.

    Returns:
        The same.

    Raises:
        ValueError: Nothing was given, or stored predictions.
    """
    if reference is None:
        raise ValueError(f"focal distillation learns from an old model, got no `reference`. {_FIX}")
    if isinstance(reference, StoredPredictions):
        raise ValueError(
            f"{reference.name} holds predictions for fixed images, but focal distillation shows the old model the "
            f"augmented images that the new one trains on, so it needs the model itself. {_FIX}; or method=lqf with "
            "method.solver=cg, which trains on fixed images"
        )
    return reference


def refuse_classes(options: Any, shared: SharedClasses) -> None:
    """Check that there are as many classes as `top_k` counts.

    Args:
        options: Hyper-parameters of the method.
        shared: The classes that both models know.

    Raises:
        ValueError: There are fewer.
    """
    most = len(shared.names) - bool(options.exclude_target)
    if options.distance == "ldi" and (options.top_k or 1) > most:
        raise ValueError(
            f"distance=ldi with top_k={options.top_k} and exclude_target={options.exclude_target} has too few classes: "
            f"the models share {len(shared.names)}. Set method.top_k=null and method.exclude_target=false"
        )


def old_head(teacher: FrozenTeacher | EnsembleTeacher, backbone: Backbone) -> nn.Linear:
    """Find the old classifier that new features are shown to.

    Args:
        teacher: The old model.
        backbone: The new network.

    Returns:
        The last layer of the old model.

    Raises:
        ValueError: A model does not end in a `Linear` layer of its own, or the new one has fewer features.
    """
    if teacher.backbone is None:
        raise ValueError(
            f"`influence` shows new features to the head of the old model, but {teacher.name} is not one plain network "
            "(ensembles and linearized models have no such head). Set method.influence=0, or reference to the "
            "checkpoint of a run with method=finetune"
        )
    old, new = (each.model.get_submodule(each.head) for each in (teacher.backbone, backbone))
    if not (isinstance(old, nn.Linear) and isinstance(new, nn.Linear)):
        raise ValueError(
            f"`influence` needs networks that end in a Linear layer, got {type(old).__name__} in {teacher.name} and "
            f"{type(new).__name__} in {backbone.name}. Set method.influence=0"
        )
    if new.in_features < old.in_features:
        raise ValueError(
            f"`influence` shows the old head {old.in_features} features, but {backbone.name} has {new.in_features}. "
            "Set method.influence=0, or backbone.name to a wider network"
        )
    return old
