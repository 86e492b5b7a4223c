"""Set-ups in which samples cannot be scored, told apart before the first batch."""

import math
from typing import Any, cast

from lightning import LightningModule, Trainer

from lqf_lightning.analysis.group_scores import read_groups
from lqf_lightning.analysis.linear_twin import refuse_method
from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.copies import refuse_copies
from lqf_lightning.methods import Method
from lqf_lightning.methods.leaking_start import mark_seen, refuse_seen

_NAME = "callbacks.sample_information"
_USUAL = {
    "sigma": "1", "temperature": "1", "learning_rate": "null", "top": "16", "memory_gib": "4", "combinations": "4",
    "chunk_size": "null",
}  # fmt: skip
_WHOLE = ("top", "combinations", "chunk_size")


def refuse_options(time: Any, kernel: str, groups: str | None, **numbers: float | None) -> None:
    """Check the options of `SampleInformation`.

    Args:
        time: When training ends.
        kernel: Its form.
        groups: What is removed together.
        **numbers: Options that must be positive where they are given, some of them whole.

    Raises:
        ValueError: An option is out of range.
    """
    known = isinstance(time, str) and time in ("auto", "optimum")
    if not known and (isinstance(time, (str, bool)) or not 0 < time < math.inf):
        raise ValueError(f"`time` must be auto, optimum or a positive number, got {time!r}. Set {_NAME}.time=auto")
    if kernel not in ("auto", "full", "trace", "last_layer"):
        raise ValueError(f"`kernel` must be auto, full, trace or last_layer, got {kernel!r}. Set {_NAME}.kernel=auto")
    for name, value in numbers.items():
        if name in _WHOLE and value is not None and not isinstance(value, int):
            raise ValueError(f"`{name}` must be a whole number, got {value}. Set {_NAME}.{name}={_USUAL[name]}")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {value}. Set {_NAME}.{name}={_USUAL[name]}")
    if groups is not None and groups != "class":
        read_groups(groups)


def refuse_run(trainer: Trainer, module: LightningModule, groups: str | None, time: Any) -> None:
    """Check that a run has samples with labels, unknown to its starting weights, and a linear-quadratic problem.

    Args:
        trainer: The running trainer.
        module: Its method.
        groups: What is removed together.
        time: When training ends.

    Raises:
        TypeError: The data do not tell samples by index.
        ValueError: Groups are removed at a finite time.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise TypeError(
            f"sample information needs an ImageDataModule, whose manifest tells which sample is which, got {data!r}. "
            "Set data=folder, or leave the callback out"
        )
    refuse_copies(data, "scores per sample (sample_information)")
    linear = refuse_method(cast(Method, module))
    if groups is not None and (time not in ("auto", "optimum") or (time == "auto" and not linear)):
        raise ValueError(
            f"groups are removed from the optimum, got time={time} with {type(module).__name__}. Set "
            f"{_NAME}.time=optimum, or {_NAME}.groups=null"
        )
    if groups is not None:
        refuse_seen(data, "scores of groups")
    mark_seen(data, "leave-one-out scores")
