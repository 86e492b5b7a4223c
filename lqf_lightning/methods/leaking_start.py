"""Starting weights that know the labels of training images, and what can no longer be said of these images."""

import logging
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

log = logging.getLogger(__name__)
_FEWEST = 2
_INSTEAD = (
    "Set head=random if it is a fitted head that knows them, or backbone.weights to some that do not; or fit on one "
    "part and train on the other: data.core={fraction:0.5,seed:0} data.part=user"
)


def seen_at_start(data: Any, index: Tensor | None = None) -> Tensor | None:
    """Which samples the starting weights have seen with their labels, so that the output f0 depends on these.

    Leaving such a sample out of the training of dw does not leave it out of f0: its leave-one-out prediction, what it
    tells and what forgetting it takes come out wrong. Those of the other samples stay exact, given f0.

    Args:
        data: The data module; one that does not know of starting weights has none that are seen.
        index: Of samples (n,), copies of an image included; None: the training samples of the run, in order of index.

    Returns:
        True where the label has been seen (n,), bool, on the device of the index; None where none has, as far as known.
    """
    seen: Tensor | None = getattr(data, "seen_by_weights", None)
    if seen is None:
        return None
    if index is None:
        index = torch.from_numpy(data.manifest.rows("train")["index"].to_numpy(copy=True))
    found = seen.to(index.device)[index % len(seen)]  # copies of an image are numbered beyond the manifest
    return found if bool(found.any()) else None


def judged_samples(data: Any, index: Tensor) -> Tensor | None:
    """Which samples may judge by their leave-one-out predictions: those whose labels the starting weights do not know.

    The others take part in the fit alone.

    Args:
        data: The data module.
        index: Of the training samples (n,), on any device; the same on every rank.

    Returns:
        True for samples that may (n,), bool; None where all may.

    Raises:
        ValueError: Fewer than two images are left, or those of a single class while there are several: always naming
            that class would look perfect.
    """
    seen = seen_at_start(data, index)
    if seen is None:
        return None
    labels = torch.from_numpy(data.manifest.table["label"].to_numpy(copy=True)).to(index.device)
    every, left = torch.unique(index % len(labels)), torch.unique(index[~seen] % len(labels))
    one_class = len(torch.unique(labels[left])) < 2 <= len(torch.unique(labels[every]))
    if len(left) < _FEWEST or one_class:
        raise ValueError(
            "choosing by leave-one-out needs images whose labels the starting weights do not know: expected at least "
            f"{_FEWEST}, of more than one class, got {len(left)} of {len(every)}. {_INSTEAD}. Or choose nothing: set "
            "method.ridge=1e-3 method.metric=identity"
        )
    rank_zero_only(log.info)(
        "leave-one-out: %d of %d training images judge; the starting weights know the labels of the others, which are "
        "fitted only",
        len(left), len(every),
    )  # fmt: skip
    return ~seen


def refuse_seen(data: Any, what: str, index: Tensor | None = None) -> None:
    """Refuse what would be wrong for samples that the starting weights have seen.

    Args:
        data: The data module.
        what: What would be wrong, as the subject of a sentence in the plural.
        index: Of the samples that it is about (n,); None: all training samples of the run.

    Raises:
        ValueError: Some of them have been seen.
    """
    seen = seen_at_start(data, index)
    if seen is not None:
        raise ValueError(
            f"{what} would be wrong for {int(seen.sum())} of {len(seen)} samples: the starting weights were trained on "
            f"them with their labels, on which f0 depends with or without them. {_INSTEAD}"
        )


def mark_seen(data: Any, what: str, index: Tensor | None = None) -> None:
    """Say what is wrong for some samples, which tables mark; where it is wrong for all, refuse.

    Args:
        data: The data module.
        what: What is wrong, as the subject of a sentence in the plural.
        index: Of the samples that it is about (n,); None: all training samples of the run.
    """
    seen = seen_at_start(data, index)
    if seen is None:
        return
    if bool(seen.all()):
        refuse_seen(data, what, index)
    rank_zero_only(log.warning)(
        "%s are wrong for %d of %d samples, marked `seen_by_weights`: the starting weights were trained on them with "
        "their labels, on which f0 depends. Those of the others are exact, given f0",
        what, int(seen.sum()), len(seen),
    )  # fmt: skip
