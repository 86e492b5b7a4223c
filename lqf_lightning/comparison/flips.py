"""Two models' answers on the same samples, set side by side."""

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lqf_lightning.congruence.flip_counts import FlipCounts, FlipTally
from lqf_lightning.congruence.intervals import Interval, compare_flips, flip_intervals, joint_table
from lqf_lightning.teachers import SharedClasses, StoredPredictions


@dataclass(frozen=True)
class Comparison:
    """Predictions of an old and a new model on the samples of a split.

    Attributes:
        rows: Rows of the manifest (N), with `index`, `path` and `class`.
        old: What the old model predicts.
        new: What the new model predicts.
        target: True classes as positions among the new model's (N,), -1 where it does not know the class.
        known: Whether both models know the class (N,).
        old_right: Whether the old model is right (N,).
        new_right: Whether the new model is right (N,).
        tally: Counts over the known samples.
    """

    rows: pd.DataFrame
    old: StoredPredictions
    new: StoredPredictions
    target: Tensor
    known: Tensor
    old_right: Tensor
    new_right: Tensor
    tally: FlipTally

    @property
    def table(self) -> Tensor:
        """Known samples by [old model right?, new model right?] (2, 2)."""
        return self.tally.table.sum(0)

    @property
    def error(self) -> float:
        """Error rate of the new model on all samples whose class it knows, known to the old model or not."""
        own = self.target >= 0
        return float((~self.new_right[own]).double().mean())

    def answers(self, chosen: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Look up predictions.

        Args:
            chosen: Positions of samples (K,).

        Returns:
            Class positions and confidences of the old model, and of the new one.
        """
        index = torch.tensor(self.rows["index"].to_numpy()[chosen.numpy()], dtype=torch.int64)
        return self.old.predictions(index), self.new.predictions(index)


def compare_answers(rows: pd.DataFrame, old: StoredPredictions, new: StoredPredictions) -> Comparison:
    """Set predictions side by side; classes are matched by name.

    Args:
        rows: Rows of the manifest.
        old: Predictions of the old model that cover them.
        new: Predictions of the new model that cover them.

    Returns:
        The comparison.
    """
    index = torch.tensor(rows["index"].to_numpy(), dtype=torch.int64)
    place = {name: position for position, name in enumerate(new.classes)}
    target = torch.tensor([place.get(name, -1) for name in rows["class"]], dtype=torch.int64)
    (old_position, _), (new_position, _) = old.predictions(index), new.predictions(index)
    own = target >= 0
    counts = FlipCounts(new.classes, old.classes, matrix=False)
    counts.update(new_position[own], old_position[own], target[own])
    expected = torch.full_like(target, -1)
    expected[own] = SharedClasses(new.classes, old.classes).old_position(target[own])
    return Comparison(
        rows=rows,
        old=old,
        new=new,
        target=target,
        known=expected >= 0,
        old_right=(old_position == expected) & (expected >= 0),
        new_right=(new_position == target) & own,
        tally=counts.compute(),
    )


def summarize(comparison: Comparison, **bootstrap: Any) -> dict[str, Any]:
    """Rates with intervals, counts and rates of each class.

    Args:
        comparison: The comparison.
        bootstrap: Options of `flip_intervals`.

    Returns:
        Plain values under `number`, `left_out`, `counts`, `metrics`, `agreement`, `error_new_all` and `classes`.
    """
    table = comparison.table
    both_wrong, positive, negative, both_right = table.flatten().tolist()
    intervals = flip_intervals(table, **bootstrap)
    accuracy = {f"accuracy_{side}": _complement(intervals[f"error_{side}"]) for side in ("old", "new")}
    counts = {"both_right": both_right, "negative_flips": negative, "positive_flips": positive}
    return {
        "number": int(table.sum()),
        "left_out": len(comparison.rows) - int(table.sum()),
        "counts": counts | {"both_wrong": both_wrong},
        "metrics": accuracy | {name: plain_interval(interval) for name, interval in intervals.items()},
        "agreement": _agreement(comparison),
        "error_new_all": comparison.error,
        "classes": _classes(comparison, **bootstrap),
    }


def paired_difference(first: Comparison, second: Comparison, **bootstrap: Any) -> dict[str, Any]:
    """How the rates of another upgrade from the same old model differ, on the same samples.

    Args:
        first: The old model beside the new one.
        second: The old model beside another new one.
        bootstrap: Options of `compare_flips`.

    Returns:
        The second's rates less the first's, with intervals.
    """
    known = first.known
    table = joint_table(first.old_right[known], first.new_right[known], second.new_right[known])
    differences = compare_flips(table, **bootstrap)
    error = plain_interval(differences["error_new"])
    accuracy = {"estimate": -error["estimate"], "low": -error["high"], "high": -error["low"]}
    return {"accuracy_new": accuracy} | {name: plain_interval(interval) for name, interval in differences.items()}


def flips(comparison: Comparison) -> list[dict[str, Any]]:
    """Negative flips, those that the new model is surest of first.

    Args:
        comparison: The comparison.

    Returns:
        Index, path, true class, and predictions and confidences of both models.
    """
    chosen = torch.nonzero(comparison.known & comparison.old_right & ~comparison.new_right).flatten()
    (old_position, old_confidence), (new_position, new_confidence) = comparison.answers(chosen)
    rows = comparison.rows.iloc[chosen.numpy()]
    found = [
        {
            "index": int(rows["index"].iloc[k]),
            "path": str(rows["path"].iloc[k]),
            "class": str(rows["class"].iloc[k]),
            "old": {"prediction": comparison.old.classes[int(old_position[k])], "confidence": float(old_confidence[k])},
            "new": {"prediction": comparison.new.classes[int(new_position[k])], "confidence": float(new_confidence[k])},
        }
        for k in range(len(rows))
    ]
    return sorted(found, key=lambda flip: -_or_zero(flip["new"]["confidence"]))


def replacements(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Count which class takes the place of which.

    Args:
        found: Negative flips, from `flips`.

    Returns:
        The true class, the class that replaces it and the number of samples, the most frequent first.
    """
    pairs = Counter((flip["class"], flip["new"]["prediction"]) for flip in found)
    ordered = sorted(pairs.items(), key=lambda pair: (-pair[1], pair[0]))
    return [{"class": true, "replaced_by": instead, "count": count} for (true, instead), count in ordered]


def plain_interval(interval: Interval) -> dict[str, float]:
    """Plain numbers of an interval.

    Args:
        interval: One quantity's interval, of shape ().

    Returns:
        `estimate`, `low` and `high`.
    """
    return {"estimate": float(interval.estimate), "low": float(interval.low), "high": float(interval.high)}


def _complement(interval: Interval) -> dict[str, float]:
    return {
        "estimate": 1 - float(interval.estimate),
        "low": 1 - float(interval.high),
        "high": 1 - float(interval.low),
    }


def _agreement(comparison: Comparison) -> float:
    shared = SharedClasses(comparison.new.classes, comparison.old.classes)
    (old, _), (new, _) = comparison.answers(torch.nonzero(comparison.known).flatten())
    return float((shared.old_position(new) == old).double().mean())


def _classes(comparison: Comparison, **bootstrap: Any) -> list[dict[str, Any]]:
    intervals = flip_intervals(comparison.tally.table, **bootstrap)["nfr"]
    table = []
    for position, report in enumerate(comparison.tally.class_reports()):
        if report.number:
            counts = comparison.tally.table[position]
            row = {"class": comparison.new.classes[position], "negative_flips": int(counts[1, 0])}
            row |= {"positive_flips": int(counts[0, 1]), **asdict(report)}
            table.append(row | {"nfr_low": float(intervals.low[position]), "nfr_high": float(intervals.high[position])})
    return sorted(table, key=lambda row: (-row["nfr"], row["class"]))


def _or_zero(value: float) -> float:
    return 0.0 if math.isnan(value) else value
