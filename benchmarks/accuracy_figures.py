"""What the cases of the accuracy benchmark say together: relative errors, paired intervals, claims."""

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

DISTANT = ("gtsrb43",)
HEADLINE = ("dtd10", "cifar10", "digits", "cars50")
_RESAMPLES = 2000


def mean_error(runs: Sequence[Mapping[str, float]]) -> float:
    """Test error in percent, the mean over seeds."""
    return 100 * statistics.fmean(1 - run["test/acc"] for run in runs)


def relative_increase(error: float, baseline: float) -> float:
    """By how much an error exceeds that of fine-tuning, in percent of the latter."""
    return 100 * (error / baseline - 1)


def paired_interval(first: Sequence[pd.Series], second: Sequence[pd.Series]) -> tuple[float, float]:
    """95 % bootstrap interval of the difference of two accuracies, in points, test images drawn with both answers.

    Args:
        first: Right or wrong by index, one per seed.
        second: The same of the other method; seeds are paired in order.

    Returns:
        Ends of the interval of first minus second.
    """
    pairs = zip(first, second, strict=False)
    difference = np.mean([a.astype(float).sub(b.astype(float)).to_numpy() for a, b in pairs], axis=0)
    rng = np.random.default_rng(0)
    draws = difference[rng.integers(len(difference), size=(_RESAMPLES, len(difference)))].mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return 100 * float(low), 100 * float(high)


def medians(sets: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """Median relative error increase over fine-tuning, of every row that all of the headline sets have."""
    rows = {key for entry in sets.values() for key in entry["rows"]}
    result = {}
    for key in sorted(rows):
        if all(key in sets[name]["rows"] for name in HEADLINE if name in sets):
            result[key] = statistics.median(sets[name]["rows"][key]["relative"] for name in HEADLINE if name in sets)
    return result


def claims(sets: Mapping[str, Mapping[str, Any]], shots: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The targets, met or not.

    Args:
        sets: Figures by image set.
        shots: Figures by image set and number of shots.

    Returns:
        Claims.
    """
    middle = medians(sets)
    result = []
    if "learned" in middle:
        result.append(_claim("median relative error increase of LQF over fine-tuning, %", middle["learned"], 12.0))
    result += [
        _claim(f"median relative error increase of LQF minus that of {key}, %", middle["learned"] - middle[key], 0.0)
        for key in ("head", "gaf")
        if key in middle and "learned" in middle
    ]
    for name, entry in sets.items():
        for key, (low, high) in entry["against"].items():
            text = f"{name}: points that LQF is behind {key}, least of the paired 95 % interval to {-low:.1f}"
            result.append(_claim(text, -high, 0.0))
    for number in ("1", "5", "10"):
        known = [
            relative_increase(by[number]["learned"], by[number]["finetune"]) for by in shots.values() if number in by
        ]
        if known:
            text = f"{number} shots: median relative error increase of LQF over fine-tuning, %"
            result.append(_claim(text, statistics.median(known), 0.0))
    return result


def _claim(text: str, value: float, target: float) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": value <= target}
