"""Options and references that `LQF` cannot match, told before anything is computed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lqf_lightning.data.copies import refuse_copies
from lqf_lightning.methods.logit_matching import LogitMatching
from lqf_lightning.teachers import StoredPredictions

_EXAMPLE = "Set 'method.tradeoff={alpha: [0, 1], beta: [0, 5]}'"


def refuse_matching_options(options: Any) -> None:
    """Check the options of `LQF` that are about a reference, whether or not there is one.

    Args:
        options: Its hyper-parameters.

    Raises:
        ValueError: One is out of range, or does not go with the solver.
    """
    for name, example in (("alpha", 1), ("beta", 5)):
        if not 0 <= options[name] < math.inf:
            raise ValueError(
                f"`{name}` must be at least 0 and finite, got {options[name]}. Set method.{name}={example}"
            )
    scale = options.reference_scale
    if scale != "auto" and (isinstance(scale, str) or not 0 < scale < math.inf):
        raise ValueError(f"`reference_scale` must be positive or auto, got {scale!r}. Set method.reference_scale=auto")
    if options.tradeoff is not None:
        _refuse_tradeoff(options)


def _refuse_tradeoff(options: Any) -> None:
    grid = options.tradeoff
    if not isinstance(grid, Mapping) or set(grid) != {"alpha", "beta"}:
        raise ValueError(f"`tradeoff` must give values of alpha and of beta, got {grid}. {_EXAMPLE}")
    for name, values in grid.items():
        numbers = values if isinstance(values, Sequence) and not isinstance(values, str) else []
        if not numbers or not all(0 <= value < math.inf for value in numbers):
            raise ValueError(
                f"`tradeoff.{name}` must be a list of numbers that are at least 0 and finite, got {values}. {_EXAMPLE}"
            )
    if options.solver not in ("auto", "kernel"):
        raise ValueError(
            f"`tradeoff` takes the kernel that solver=kernel assembles, got solver={options.solver}. Set "
            "method.solver=kernel, or method.tradeoff=null"
        )


def refuse_reference(options: Any, matching: LogitMatching | None, data: Any) -> None:
    """Check that a fit has the reference that it needs, and that the reference can answer.

    Args:
        options: Hyper-parameters of the method.
        matching: The reference, if there is one.
        data: The data module.

    Raises:
        ValueError: There is none to compare with, it cannot be matched by this loss, it does not hold outputs, or its
            stored outputs are of other images than those that are trained on.
    """
    if matching is None:
        if options.tradeoff is not None:
            raise ValueError(
                "`tradeoff` compares with a reference, got none. Set reference=RUN/checkpoints/best.ckpt, or "
                "method.tradeoff=null"
            )
        return
    if options.loss != "squared":
        raise ValueError(
            f"a reference is matched by the squared loss, got loss={options.loss!r}. Set method.loss=squared, or "
            "method.reference=null"
        )
    if options.tradeoff is not None and not data.val_dataloader():
        raise ValueError(
            "`tradeoff` counts flips on the validation set, and there is none. Set data.val_fraction=0.1, or "
            "method.tradeoff=null"
        )
    if isinstance(matching.reference, StoredPredictions):
        _refuse_stored(options, matching.reference, data)


def _refuse_stored(options: Any, stored: StoredPredictions, data: Any) -> None:
    if not stored.has_logits:
        raise ValueError(
            f"{stored.name} has no column `logits`, and outputs are what is matched. Set reference to a file with it, "
            "or to the model itself"
        )
    refuse_copies(data, f"the outputs that {stored.name} holds")
    transform = getattr(data, "training_transform", None)
    if options.solver == "sgd" and transform is not None and getattr(transform, "random", True):
        raise ValueError(
            f"{stored.name} holds outputs for images without augmentation, and solver=sgd trains on augmented ones. "
            "Set method.solver=cg or data/augmentation=none, or reference to the model itself"
        )
    if not hasattr(data, "manifest"):
        return
    for split in ("train",) if options.tradeoff is None else ("train", "val"):
        rows = data.manifest.rows(split)
        stored.check(rows["index"].tolist(), rows["sha"].tolist(), split)
