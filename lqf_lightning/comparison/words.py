"""The numbers of a comparison in words: the verdict, and what each quantity means."""

import math
from collections.abc import Mapping
from typing import Any

Report = Mapping[str, Any]

QUANTITIES = {
    "accuracy": ("accuracy", "Share of images that a model gets right."),
    "error": ("error", "Share of images that a model gets wrong."),
    "nfr": ("negative flip rate (NFR)", "Share of images that the old model gets right and the new one wrong."),
    "pfr": ("positive flip rate (PFR)", "Share of images that the old model gets wrong and the new one right."),
    "relative_nfr": (
        "relative NFR",
        "Negative flips as a multiple of those of two models with these errors that err independently of each other: 0 "
        "is no regression, 1 no better than an unrelated model.",
    ),
    "nfi": ("negative flip impact (NFI)", "Share of the new model's errors that are negative flips."),
    "pfi": ("positive flip impact (PFI)", "Share of the new model's right answers that are positive flips."),
}
_OF_BOTH = ("accuracy", "error")  # quantities that the old model has, too
_MULTIPLES = ("relative_nfr",)


def values_of(flips: Report, name: str, role: str) -> Report | None:
    """Look a quantity up.

    Args:
        flips: Summary of a comparison.
        name: One of `QUANTITIES`.
        role: "old" or "new".

    Returns:
        Estimate and interval; None for what is no quantity of the old model alone.
    """
    if name in _OF_BOTH:
        found: Report = flips["metrics"][f"{name}_{role}"]
        return found
    return flips["metrics"][name] if role == "new" else None


def number(name: str, value: float | None) -> str:
    """Write a quantity.

    Args:
        name: Its name in the report.
        value: Its value; None or NaN where it is not defined.

    Returns:
        Text such as "8.30 %", or "0.440" for multiples.

    Example:
        >>> number("nfr", 0.083), number("relative_nfr", 0.44), number("nfi", None)
        ('8.30 %', '0.440', 'undefined')
    """
    if value is None or value != value:
        return "undefined"
    return f"{value:.3f}" if name in _MULTIPLES else f"{100 * value:.2f} %"


def interval(name: str, values: Report, samples: int) -> str:
    """Write an interval.

    Args:
        name: Name of the quantity.
        values: `low` and `high`, beside `estimate`.
        samples: Number of images N. A rate of 0 has a bootstrap interval of no width; the rule of three, 3 / N, bounds
            it.

    Returns:
        Text such as "6.60 to 10.00 %".

    Example:
        >>> interval("nfr", {"estimate": 0.083, "low": 0.066, "high": 0.1}, 1000)
        '6.60 to 10.00 %'
        >>> interval("nfr", {"estimate": 0.0, "low": 0.0, "high": 0.0}, 1000)
        'below 0.30 %'
    """
    low, high = values["low"], values["high"]
    if low is None or high is None or low != low or high != high:
        return ""
    if low == high == 0 and name not in _MULTIPLES and samples:
        return f"below {100 * min(3 / samples, 1):.2f} %"
    return f"{low:.3f} to {high:.3f}" if name in _MULTIPLES else f"{100 * low:.2f} to {100 * high:.2f} %"


def difference(name: str, value: float) -> str:
    """Write a difference of quantities.

    Args:
        name: Their name in the report.
        value: The difference.

    Returns:
        Text such as "-3.20 points"; without a unit for multiples.

    Example:
        >>> difference("nfr", -0.032), difference("relative_nfr", 0.004)
        ('-3.20 points', '+0.004')
    """
    return f"{value:+.3f}" if name in _MULTIPLES else f"{100 * value:+.2f} points"


def difference_interval(name: str, values: Report) -> str:
    """Write the interval of a difference.

    Args:
        name: Name of the quantity.
        values: `low` and `high`.

    Returns:
        Text such as "-3.80 to -1.20 points"; empty where there is none.

    Example:
        >>> difference_interval("nfr", {"low": -0.038, "high": -0.012})
        '-3.80 to -1.20 points'
    """
    if values["low"] is None or values["high"] is None:
        return ""
    return f"{difference(name, values['low']).removesuffix(' points')} to {difference(name, values['high'])}"


def verdict(report: Report) -> str:
    """Say in plain words what the upgrade does.

    Args:
        report: The report, see `report.json`.

    Returns:
        Some sentences.
    """
    flips = report["flips"]
    counts, metrics = flips["counts"], flips["metrics"]
    gain = metrics["accuracy_new"]["estimate"] - metrics["accuracy_old"]["estimate"]
    change = f"{'raises' if gain > 0 else 'lowers'} accuracy by {abs(100 * gain):.2f} points to" if gain else "keeps"
    rate = f"{number('nfr', metrics['nfr']['estimate'])}, {interval('nfr', metrics['nfr'], flips['number'])}"
    return (
        f"On {flips['number']:,} {report['split']} images the new model {change} "
        f"{number('accuracy', metrics['accuracy_new']['estimate'])}{'' if gain else ' accuracy'}. It breaks "
        f"{counts['negative_flips']:,} answers that were right (negative flip rate {rate}) and mends "
        f"{counts['positive_flips']:,} that were wrong.{_of_averages(report['averages'])}"
    )


def _of_averages(averages: Report) -> str:
    if not averages["kinds"]:
        return ""
    chosen, cost = averages["chosen"], averages["least_increase"]
    if chosen is None and cost is None:
        return " No average of old and new weights has fewer negative flips on the validation images."
    if chosen is None:
        return (
            " No average of old and new weights has fewer negative flips on the validation images at the new model's "
            f"accuracy; one has if accuracy may fall by {100 * cost:.2f} points "
            f"(max_error_increase={math.ceil(round(1e4 * cost, 5)) / 1e4:g})."
        )
    result, change = averages["result"]["metrics"], averages["difference"]["nfr"]
    apart = change["low"] is not None and (change["low"] > 0 or change["high"] < 0)
    between = difference_interval("nfr", change)
    return (
        f" A weight average ({chosen['kind']}, {100 * chosen['share']:g} % old), chosen on validation images, has an "
        f"accuracy of {number('accuracy', result['accuracy_new']['estimate'])} and a negative flip rate of "
        f"{number('nfr', result['nfr']['estimate'])}, {difference('nfr', change['estimate'])} against the new model's"
        f"{f' ({between})' if between else ''}"
        f"{'' if apart else ', which may be chance'}."
    )
