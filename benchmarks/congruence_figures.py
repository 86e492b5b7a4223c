"""What `congruence.py` reports: rates and intervals of every update, and the targets they are held against."""

import statistics
from typing import TYPE_CHECKING, Any

import torch
from congruence_plan import Plan, Update

from lqf_lightning.congruence import flip_intervals, flip_report

if TYPE_CHECKING:
    from congruence import Workshop

DISTILLED = ("fd_lm", "fd_kl", "fd_lm_strong", "fd_kl_strong")
LEAST, AIM = 0.20, 0.40  # reduction of the relative negative flip rate
MOST_ERROR = 0.005


def counts(old: torch.Tensor, new: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Samples by old model right?, new model right? (2, 2)."""
    cells = 2 * (old.argmax(1) == target).long() + (new.argmax(1) == target).long()
    return torch.bincount(cells, minlength=4).view(2, 2)


def rates(tables: list[torch.Tensor]) -> dict[str, Any]:
    """Rates of the pooled counts of all seeds, with intervals of the draw of test images, and the seeds by themselves.

    Seeds share their test images, so each is resampled by itself and the ends are those of a single seed's size: the
    interval of the mean over seeds is narrower, that of a further seed wider.
    """
    whole = flip_report(sum(tables, torch.zeros(2, 2, dtype=torch.int64)))
    ends = flip_intervals(torch.stack(tables))
    result: dict[str, Any] = {"seeds": len(tables), "number": whole.number}
    for name in ("error_old", "error_new", "nfr", "pfr", "relative_nfr"):
        own = ends[name]
        result[name] = getattr(whole, name)
        result[f"{name}_interval"] = [float(own.low.mean()), float(own.high.mean())]
        result[f"{name}_by_seed"] = own.estimate.tolist()
    return result


def figures(plans: list[Plan], workshop: "Workshop") -> dict[str, Any]:
    """All updates that have at least one finished pair."""
    updates = [update for plan in plans for update in plan.updates]
    return {update.name: rows for update in updates if (rows := _rows(update, workshop))}


def _rows(update: Update, workshop: "Workshop") -> dict[str, Any]:
    target, rows = workshop.target(), {}
    for method, models in update.new.items():
        before = update.old_of.get(method, update.old)
        tables, seconds = [], []
        for old, new in zip(before, models, strict=False):
            outputs = workshop.outputs(old), workshop.outputs(new)
            if outputs[0] is not None and outputs[1] is not None:
                tables.append(counts(outputs[0], outputs[1], target))
                seconds.append(sum(workshop.seconds(name) for name in new))
        if tables:
            rows[method] = {**rates(tables), "seconds": statistics.mean(seconds)}
    reports = [workshop.average(*pair) for pair in update.averaged if workshop.has_average(*pair)]
    averages = [report["averages"] for report in reports]
    # Where no average is accurate enough, the new model itself is kept: that is the outcome of such a seed.
    kept = [
        found["result"] if found["chosen"] else whole["flips"] for found, whole in zip(averages, reports, strict=True)
    ]
    if kept:
        rows["weights averaged, from the old weights"] = rates([_table(result["counts"]) for result in kept]) | {
            "chosen": [found["chosen"] for found in averages]
        }
    return rows


def _table(counts: dict[str, int]) -> torch.Tensor:
    cells = ("both_wrong", "positive_flips", "negative_flips", "both_right")
    return torch.tensor([counts[cell] for cell in cells]).view(2, 2)


def claims(name: str, report: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets of one set."""
    result = []
    for update, rows in report["updates"].items():
        if "linearized" in update:
            result += _linear_claims(f"{name}, {update}", rows)
            continue
        for method in DISTILLED:
            if method in rows and "none" in rows:
                less = 1 - rows[method]["relative_nfr"] / rows["none"]["relative_nfr"]
                result.append(_claim(f"{name}, {update}: {method} lowers relative NFR by", less, LEAST, less >= LEAST))
    distilled = [rows for update, rows in report["updates"].items() if "none" in rows and "fd_lm" in rows]
    for method in DISTILLED:
        more = [rows[method]["error_new"] - rows["none"]["error_new"] for rows in distilled if method in rows]
        less = [1 - rows[method]["relative_nfr"] / rows["none"]["relative_nfr"] for rows in distilled if method in rows]
        if more:
            middle, lowered = statistics.median(more), statistics.median(less)
            what = f"{name}: error added by {method}, median of updates"
            result.append(_claim(what, middle, MOST_ERROR, middle <= MOST_ERROR))
            what = f"{name}: relative NFR lowered by {method}, median of updates (aim)"
            result.append(_claim(what, lowered, AIM, lowered >= AIM))
    return result


def _linear_claims(where: str, rows: dict[str, Any]) -> list[dict[str, Any]]:
    result = []
    for method in ("fd_lm, exact", "fd_lm, exact by CG"):
        if method not in rows or "fd_lm, SGD" not in rows:
            continue
        for key, text in (("relative_nfr", "relative NFR"), ("error_new", "error"), ("seconds", "processor time")):
            ratio = rows[method][key] / rows["fd_lm, SGD"][key]
            result.append(_claim(f"{where}: {text}, {method} over fd_lm, SGD", ratio, 1.0, ratio <= 1.0))
    return result


def _claim(text: str, value: float, target: float, holds: bool) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": holds}
