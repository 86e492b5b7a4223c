"""Options that self-supervised methods cannot work with."""

from collections.abc import Mapping, Sequence

from lqf_lightning.backbones import Backbone


def refuse_layers(
    backbone: Backbone, layers: Sequence[str] | None, group_lr: Mapping[str, float] | None, teacher: str
) -> None:
    """Check which layer groups are to train, and how fast.

    Args:
        backbone: The network.
        layers: Layer groups that train; None means all but the head.
        group_lr: Learning-rate factor per group.
        teacher: Name of the teacher.

    Raises:
        ValueError: The head is asked for, or a teacher with batch statistics of a network that has none in parts.
    """
    body = [group for group in backbone.groups if group != "head"]
    for name, groups in (("layers", layers), ("group_lr", group_lr)):
        if "head" in (groups or ()):
            raise ValueError(
                f"self-supervised methods train features, not the head, but `{name}` names it. Set method.{name} to "
                f"some of {body}, or to null"
            )
    if teacher == "ema" and layers is not None:
        raise ValueError(
            "a teacher that normalizes by its own batches (teacher=ema) cannot follow a network of which parts keep "
            f"running statistics (layers={list(layers)}). Set method.teacher=eman or method.layers=null"
        )
