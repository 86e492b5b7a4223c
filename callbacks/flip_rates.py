"""Rates of an upgrade: what is logged, and what is written down."""

import math
from dataclasses import asdict
from typing import Any

from lightning import LightningModule
from torch import Tensor

from lqf_lightning.congruence.flip_counts import FlipCounts, FlipTally
from lqf_lightning.congruence.intervals import flip_intervals
from lqf_lightning.teachers import StoredPredictions

from .flip_checks import classes_of

_RATES = ("error_old", "error_new", "nfr", "pfr", "relative_nfr", "nfi", "pfi")


def count_flips(
    module: LightningModule, old: StoredPredictions, index: Tensor, target: Tensor, prediction: Tensor
) -> FlipTally:
    """Compare the samples of all processes.

    Args:
        module: The model of this run.
        old: What the old model predicted.
        index: Rows of the manifest of this process's samples (B,).
        target: Their true classes (B,).
        prediction: What the model of this run predicts (B,).

    Returns:
        The counts over all processes.
    """
    counts = FlipCounts(classes_of(module), old.classes, matrix=False).to(module.device)
    counts.update(prediction, old.predictions(index)[0], target)
    tally: FlipTally = counts.compute()
    return tally


def named_rates(tally: FlipTally, stage: str, name: str) -> dict[str, float]:
    """Rates by the names of their metrics.

    Args:
        tally: The counts.
        stage: "val" or "test".
        name: What the old model is called, "" for the only one.

    Returns:
        ``val/nfr`` or ``val/nfr/NAME`` and so on; the number of samples that were left out, if there are any.
    """
    rates = asdict(tally.report())
    named = {"error" if rate == "error_new" else rate: rates[rate] for rate in _RATES}
    if int(tally.unshared):
        named["flips_unshared"] = float(tally.unshared)
    return {f"{stage}/{rate}{f'/{name}' if name else ''}": value for rate, value in named.items()}


def summarize(tally: FlipTally, classes: list[str], name: str) -> dict[str, Any]:
    """Rates with 95 % bootstrap intervals, over all samples and for every class.

    Args:
        tally: The counts.
        classes: Class names of the model of this run.
        name: The old model.

    Returns:
        Plain values: `reference`, `number` of samples, `left_out` for want of their class in the old model, an
        `estimate` with its `low` and `high` end for every rate, and by class the `number` of samples, the estimates,
        and the ends for the negative flip rate. None stands for what is not defined.
    """
    table = tally.table.cpu()
    whole, parts = flip_intervals(table.sum(0)), flip_intervals(table)
    by_class = {}
    for position, (label, report) in enumerate(zip(classes, tally.class_reports(), strict=True)):
        by_class[label] = {key: _plain(value) for key, value in asdict(report).items()}
        by_class[label] |= {f"nfr_{end}": _plain(getattr(parts["nfr"], end)[position]) for end in ("low", "high")}
    ends = ("estimate", "low", "high")
    return {
        "reference": name,
        "number": int(table.sum()),
        "left_out": int(tally.unshared),
        "rates": {rate: {end: _plain(getattr(whole[rate], end)) for end in ends} for rate in _RATES},
        "classes": by_class,
    }


def _plain(value: Any) -> float | int | None:
    number = value if isinstance(value, int) else float(value)
    return number if math.isfinite(number) else None
