"""Cohorts and runs that cannot be bounded, told apart before the first batch."""

import math
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer

from lqf_lightning.analysis.cohort_optima import NOTHING
from lqf_lightning.analysis.linear_twin import refuse_method
from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.cohort import Cohort
from lqf_lightning.data.copies import refuse_copies
from lqf_lightning.methods import LQF
from lqf_lightning.methods.leaking_start import refuse_seen

_NAME = "callbacks.forgetting_bounds"
_USUAL = {"sigma": "0.001", "queries": "32", "tolerance": "0.001", "memory_gib": "4", "chunk_size": "null"}
_WHOLE = ("queries", "chunk_size")
_LIMIT = 20_000  # rows of a kernel


def refuse_bound_options(cohorts: Mapping[str, Any], **numbers: float | None) -> None:
    """Check the options of `ForgettingBounds`.

    Args:
        cohorts: What to forget, by name.
        **numbers: Options that must be positive where they are given, some of them whole.

    Raises:
        ValueError: There is no cohort, a name cannot be part of a metric's, or an option is out of range.
    """
    example = f"Set {_NAME}.cohorts={{sample: {{fraction: 0.01}}}}"
    if not isinstance(cohorts, Mapping) or not cohorts:
        raise ValueError(f"`cohorts` must name at least one cohort, got {cohorts!r}. {example}")
    names = [str(name) for name in cohorts]
    if odd := [name for name in names if name == NOTHING or "/" in name or not name.strip()]:
        raise ValueError(
            f"{odd[0]!r} cannot be the name of a cohort: names are parts of metric keys, and {NOTHING!r} is the cohort "
            f"without samples. {example}"
        )
    if len(set(names)) < len(names):
        raise ValueError(f"two cohorts have the same name, got {names}. {example}")
    for name, value in numbers.items():
        if name in _WHOLE and value is not None and (isinstance(value, bool) or not isinstance(value, int)):
            raise ValueError(f"`{name}` must be a whole number, got {value}. Set {_NAME}.{name}={_USUAL[name]}")
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {value}. Set {_NAME}.{name}={_USUAL[name]}")


def refuse_bound_run(trainer: Trainer, module: LightningModule) -> ImageDataModule:
    """Check that a run has a linear-quadratic problem of its own, small enough for its kernel.

    Args:
        trainer: The running trainer.
        module: Its method.

    Returns:
        Its data.

    Raises:
        TypeError: The data do not tell samples by index.
        ValueError: The model is not linear, its loss not squared, or the set too large.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise TypeError(
            f"forgetting bounds need an ImageDataModule, whose manifest tells which sample is which, got {data!r}. Set "
            "data=folder, or leave the callback out"
        )
    refuse_copies(data, "forgetting bounds")
    if not isinstance(module, LQF):
        raise ValueError(
            f"forgetting bounds are exact for linear models, got {type(module).__name__}. Set method=lqf, or leave the "
            "callback out"
        )
    refuse_method(module)
    samples, outputs = len(data.manifest.rows("train")), len(module.classes)
    if samples * outputs > _LIMIT:
        raise ValueError(
            f"forgetting bounds take the full kernel, of at most {_LIMIT} samples times classes, got {samples} x "
            f"{outputs} = {samples * outputs}: a smaller kernel has no weights to bound. Set data.subset_ratio="
            f"{0.9 * _LIMIT / (samples * outputs):.2g}, or leave the callback out"
        )
    return data


def parse_cohorts(cohorts: Mapping[str, Any], manifest: Manifest) -> dict[str, Cohort]:
    """Find the samples of every cohort.

    Args:
        cohorts: What to forget, by name.
        manifest: Of the run.

    Returns:
        Cohorts by name.

    Raises:
        ValueError: A cohort is empty, everything, or not of this run.
    """
    found = {}
    for name, spec in cohorts.items():
        try:
            found[str(name)] = Cohort.parse(spec, manifest)
        except (ValueError, OSError) as error:
            raise ValueError(
                f"{_NAME}.cohorts.{name}: {error}. Set {_NAME}.cohorts.{name}={{fraction: 0.01}}"
            ) from error
    return found


def refuse_seen_cohorts(data: ImageDataModule, cohorts: Mapping[str, Cohort]) -> None:
    """Refuse cohorts whose labels the starting weights know: the model would hold them without dw too.

    Args:
        data: The data.
        cohorts: Samples by name.
    """
    for name, cohort in cohorts.items():
        refuse_seen(data, f"bounds on what the cohort {name} leaves behind", cohort.indices)
