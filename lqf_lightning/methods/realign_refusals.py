"""What cannot be re-aligned, told apart before the first step."""

from collections.abc import Mapping
from typing import Any

from lqf_lightning.data.option import check_option


def refuse_options(
    batch_norm: str, passes: int, anneal: float, weights: Mapping[str, float], temperature: float
) -> None:
    """Check the options of a `Realign`.

    Args:
        batch_norm: How training normalizes.
        passes: Over the images, for statistics.
        anneal: Share of the steps in which activations change.
        weights: Weights of the terms of the loss, by option.
        temperature: Of the softmax.

    Raises:
        ValueError: One is out of range, two contradict each other, or no term is left.
    """
    known = batch_norm in ("train", "frozen")
    check_option("batch_norm", batch_norm, known, "'train' or 'frozen'", "train", "method")
    check_option("statistics_passes", passes, passes >= 0, "at least 0", 2, "method")
    check_option("anneal", anneal, 0 <= anneal <= 1, "in [0, 1]", 0.5, "method")
    check_option("temperature", temperature, temperature > 0, "above 0", 1, "method")
    for name, weight in weights.items():
        check_option(name, weight, weight >= 0, "at least 0", 1, "method")
    if passes and anneal:
        raise ValueError(
            f"got method.statistics_passes={passes} and method.anneal={anneal}: statistics of the leaky network do not "
            "fit the original activations that training begins with. Set method.statistics_passes=0 or method.anneal=0"
        )
    if not weights["feature_weight"] and not weights["logit_weight"]:
        raise ValueError(
            f"nothing after the last layer group is compared with the original: got {dict(weights)}, where the outputs "
            "of a head that did not come with the weights count nothing. Set method.feature_weight=1"
        )


def refuse_small_batches(data: Any, world_size: int) -> None:
    """Check that every process gets two images in a step: one has no spread that an error could be relative to.

    Args:
        data: The `UnlabeledImages` of the trainer.
        world_size: Number of processes.

    Raises:
        ValueError: A process gets a single image.
    """
    size = data.data.batch_size
    if size < 2 * world_size:
        raise ValueError(
            f"data.batch_size={size} gives {world_size} processes less than two images each, and one has no spread to "
            "compare an error with. Set data.batch_size=32"
        )


def refuse_other_student(kept: Mapping[str, Any] | None, slope: float, weights: str) -> None:
    """Check that a checkpoint is of the same student.

    Args:
        kept: What a `Realign` left in the checkpoint.
        slope: Of the leaky activations now.
        weights: Where the original comes from now, in words.

    Raises:
        ValueError: It is of another one, or of no `Realign`.
    """
    found = None if kept is None else (kept["slope"], kept["weights"])
    if found != (slope, weights):
        raise ValueError(
            f"the checkpoint is of an adaptation with (slope, weights)={found}, which cannot go on with "
            f"{(slope, weights)}. Set ckpt_path=null to start over, or hydra.run.dir to another folder"
        )
