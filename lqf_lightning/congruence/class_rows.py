"""The head of an old model in the order of a new model's classes."""

from collections.abc import Sequence

from torch import Tensor

from lqf_lightning.congruence.state_layout import State
from lqf_lightning.teachers.shared_classes import SharedClasses


def align_classes(
    old: State, new: State, head: str, old_classes: Sequence[str], new_classes: Sequence[str]
) -> dict[str, Tensor]:
    """Bring the rows of the old head into the new order, so that the states can be averaged.

    Rows are matched by class name. Rows of classes that only the new model knows are the new model's, and so stay as
    they are in any average of the two; rows of classes that only the old model knows are dropped.

    Args:
        old: State of the old model.
        new: State of the new model.
        head: Name of the final layer, such as ``fc``; empty if the whole network is one.
        old_classes: Class names of the old model, in the order of its outputs.
        new_classes: Class names of the new model, in the order of its outputs.

    Returns:
        The old state; the entries of the head have a row for each class of the new model.

    Raises:
        ValueError: The head is not in both states with a row per class, or no class is shared.

    Example:
        >>> import torch
        >>> old, new = {"fc.bias": torch.tensor([1.0, 2.0])}, {"fc.bias": torch.tensor([10.0, 20.0, 30.0])}
        >>> align_classes(old, new, "fc", ["cat", "dog"], ["dog", "fox", "cat"])["fc.bias"].tolist()
        [2.0, 20.0, 1.0]
    """
    shared = SharedClasses(new_classes, old_classes)
    prefix = f"{head}." if head else ""
    rows = [name for name in new if name.startswith(prefix) and "." not in name[len(prefix) :]]
    if not rows:
        raise ValueError(f"the new model has no final layer {head!r}; its entries end in {list(new)[-3:]}")
    aligned = {name: entry.detach().clone() for name, entry in old.items()}
    for name in rows:
        _check_rows(name, old, (len(old_classes), *new[name].shape[1:]), "old")
        _check_rows(name, new, (len(new_classes), *new[name].shape[1:]), "new")
        aligned[name] = new[name].detach().to(old[name], copy=True)
        aligned[name][shared.new_columns] = old[name].detach()[shared.old_columns]
    return aligned


def _check_rows(name: str, state: State, expected: tuple[int, ...], side: str) -> None:
    found = tuple(state[name].shape) if name in state else None
    if found != expected:
        raise ValueError(
            f"{name} of the {side} model is {found or 'missing'}, expected {expected}: a row for each of its "
            f"{expected[0]} classes"
        )
