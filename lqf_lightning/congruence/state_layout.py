"""States of networks that can be averaged: the same entries of the same shapes."""

from collections.abc import Mapping

from torch import Tensor

State = Mapping[str, Tensor]


def check_layout(first: State, second: State, names: tuple[str, str] = ("old", "new")) -> None:
    """Make sure that two states have the same entries.

    Args:
        first: Tensors by name.
        second: Tensors by name.
        names: What to call the two.

    Raises:
        ValueError: Names, shapes or types differ; the message lists which.

    Example:
        >>> import torch
        >>> check_layout({"bias": torch.zeros(2)}, {"bias": torch.zeros(3)})  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ...
        ValueError: the old and the new model differ: bias is (2,) torch.float32 in the old and (3,) ... in the new...
    """
    gaps = [f"{key} is missing in the {names[1]}" for key in first if key not in second]
    gaps += [f"{key} is missing in the {names[0]}" for key in second if key not in first]
    for key in first:
        if key in second and _kind(first[key]) != _kind(second[key]):
            gaps.append(f"{key} is {_kind(first[key])} in the {names[0]} and {_kind(second[key])} in the {names[1]}")
    if gaps:
        listed = "; ".join(gaps[:5]) + (f"; and {len(gaps) - 5} more" if len(gaps) > 5 else "")
        raise ValueError(
            f"the {names[0]} and the {names[1]} model differ: {listed}. Give states of one architecture; for other "
            "classes use `align_classes` first"
        )


def _kind(entry: Tensor) -> str:
    return f"{tuple(entry.shape)} {entry.dtype}"
