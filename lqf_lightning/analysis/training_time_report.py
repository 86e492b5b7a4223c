"""Steps to thresholds, as predicted and as measured: the numbers, and the file that holds them."""

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from lqf_lightning.linear.training_time import TrainingTime, first_passage, training_times


def threshold_rows(
    times: Sequence[TrainingTime], initial: float, epoch: int, seconds_per_step: float | None = None
) -> list[dict[str, Any]]:
    """One row per threshold.

    Args:
        times: Predicted times.
        initial: Loss before training.
        epoch: Steps per epoch.
        seconds_per_step: What a step takes, if it is known.

    Returns:
        Rows of `fraction`, `loss` (the threshold), `predicted_steps`, `predicted_epochs`, `predicted_seconds` (None
        where the loss is not reached) and `lower_bound`.

    Example:
        >>> threshold_rows([TrainingTime(0.5, 30)], 4.0, 20, 0.1)[0]["predicted_epochs"]
        1.5
    """
    rows = []
    for time in times:
        steps = time.steps
        known = steps is not None and seconds_per_step is not None
        rows.append({
            "fraction": time.fraction,
            "loss": time.fraction * initial,
            "predicted_steps": steps,
            "predicted_epochs": None if steps is None else steps / epoch,
            "predicted_seconds": (steps or 0) * (seconds_per_step or 0.0) if known else None,
            "lower_bound": time.lower_bound,
        })
    return rows


def compare_with(rows: Sequence[Mapping[str, Any]], measured: Tensor, window: int) -> list[dict[str, Any]]:
    r"""Add what a run has measured, and by how much the prediction was off, :math:`|\hat T - T| / T`.

    Args:
        rows: As of `threshold_rows`.
        measured: Loss of the batch of every step (T,).
        window: Steps that are averaged.

    Returns:
        The rows with `measured_steps` and `relative_error`, None where there is no number.
    """
    found = []
    for row in rows:
        steps = first_passage(measured, row["loss"], window)
        predicted = row["predicted_steps"]
        error = abs(predicted - steps) / steps if steps and predicted is not None else None
        found.append({**row, "measured_steps": steps, "relative_error": error})
    return found


def median_error(rows: Sequence[Mapping[str, Any]]) -> float | None:
    """The median of the relative errors.

    Args:
        rows: As of `compare_with`.

    Returns:
        The median, None without any error.
    """
    errors = [row["relative_error"] for row in rows if row.get("relative_error") is not None]
    return statistics.median(errors) if errors else None


def predicted_rows(
    batch_loss: Tensor, initial: float, thresholds: Sequence[float], epoch: int, seconds_per_step: float | None = None
) -> list[dict[str, Any]]:
    """Thresholds of a predicted run, from the losses of its batches, an epoch of which is averaged.

    Args:
        batch_loss: Loss of the batch of every step (T,).
        initial: Loss of all samples before training.
        thresholds: Fractions of it.
        epoch: Steps per epoch.
        seconds_per_step: What a step takes, if it is known.

    Returns:
        As of `threshold_rows`.
    """
    times = training_times(batch_loss, thresholds, window=epoch, initial=initial)
    return threshold_rows(times, initial, epoch, seconds_per_step)


def write_report(path: Path, report: Mapping[str, Any]) -> None:
    """Write a report as JSON that is never seen half-written; what is not finite becomes null.

    Args:
        path: The file.
        report: Plain values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(_finite(report), indent=2, allow_nan=False) + "\n")
    partial.replace(path)


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
