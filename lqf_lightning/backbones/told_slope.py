"""Weights that were trained with leaky activations, loaded into a network with others."""

import json
import math
from pathlib import Path
from typing import Any

from safetensors import safe_open


def refuse_other_slope(weights: Any, slope: float | None) -> None:
    """Check that a file of weights is used with the activations that it was trained with.

    ReLU and leaky ReLU have no tensors, so that such weights fit every network of their architecture, but compute the
    function that was trained only with the slope that was trained. Files that ``lqf-adapt`` and ``lqf-export`` write
    say which; a file that says nothing is taken for one of a network as published.

    Args:
        weights: The option ``backbone.weights``.
        slope: The option ``backbone.leaky_slope``.

    Raises:
        ValueError: The file says another slope.
    """
    told = told_slope(weights)
    if told is None or (slope is not None and math.isclose(told, slope)):
        return
    raise ValueError(
        f"the weights in {weights} were trained with leaky activations of slope {told}, got backbone.leaky_slope="
        f"{'null' if slope is None else slope}: with it they compute another function. Set backbone.leaky_slope={told}"
    )


def told_slope(weights: Any) -> float | None:
    """The slope of the activations that a file's weights belong to, by its metadata.

    Args:
        weights: The option ``backbone.weights``; anything but the path of a ``.safetensors`` file says nothing.

    Returns:
        The slope, or None if the file does not exist, is none of ours or is of a network as published.
    """
    told = told_facts(weights)
    return float(json.loads(told["leaky_slope"])) if "leaky_slope" in told else None


def told_facts(weights: Any) -> dict[str, str]:
    """What a file that ``lqf-export`` or ``lqf-adapt`` wrote says of itself.

    Args:
        weights: The option ``backbone.weights``; anything but the path of a ``.safetensors`` file says nothing.

    Returns:
        Its metadata; empty if the file does not exist or is none of ours.
    """
    path = Path(str(weights)).expanduser()
    if path.suffix != ".safetensors" or not path.is_file():
        return {}
    with safe_open(path, "pt") as file:
        told: dict[str, str] = file.metadata() or {}
    return told if "lqf_lightning" in told else {}
