"""From scores to figures: ROC-AUC with bootstrap intervals, differences to the best peer, and claims."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

PEERS = ("cleanlab", "trak", "ekfac")
GRADIENT_PEERS = ("trak", "ekfac")
RESAMPLES, CHUNK = 2000, 250


def weighted_auc(score: Tensor, wrong: Tensor, counts: Tensor) -> Tensor:
    """ROC-AUC for every row of counts (R, n), ties counting half."""
    values, place = score.unique(return_inverse=True)
    shape = (len(counts), len(values))
    positive = torch.zeros(shape, dtype=torch.float64).index_add_(1, place, counts * wrong)
    negative = torch.zeros(shape, dtype=torch.float64).index_add_(1, place, counts * ~wrong)
    below = negative.cumsum(1) - negative / 2
    return (positive * below).sum(1) / (positive.sum(1) * negative.sum(1))


def auc(score: Tensor, wrong: Tensor) -> float:
    """How well a score tells wrong labels from right ones: the ROC-AUC."""
    return float(weighted_auc(score, wrong, torch.ones(1, len(wrong), dtype=torch.float64)))


def resample(wrong: Tensor, seed: int = 0) -> Tensor:
    """How often each resample holds each sample (R, n), the same for all detectors; wrong labels keep their number."""
    generator = torch.Generator().manual_seed(seed)
    counts = torch.zeros(RESAMPLES, len(wrong), dtype=torch.float64)
    for chosen in (wrong, ~wrong):
        rows = chosen.nonzero().flatten()
        drawn = rows[torch.randint(len(rows), (RESAMPLES, len(rows)), generator=generator)]
        counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))
    return counts


def interval(values: Tensor) -> list[float]:
    """The middle 95 % of resampled values."""
    return torch.quantile(values, torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()


def judge_set(parts: Mapping[str, Mapping[str, Any]], wrong: Tensor) -> dict[str, Any]:
    """All detectors of a set.

    Args:
        parts: What each part measured; those of the peers score the network of the part `training`.
        wrong: Whether a label is wrong (n,).

    Returns:
        By detector: AUC with interval, seconds end to end, and the difference to the best peer with interval.
    """
    counts, detectors, drawn = resample(wrong), {}, {}
    for part, found in parts.items():
        training = parts["training"]["training"] if part in GRADIENT_PEERS else 0.0
        for name, column in found["scores"].items():
            score = torch.tensor(column, dtype=torch.float64)
            broken = int((~torch.isfinite(score)).sum())
            score = score.nan_to_num()
            key = f"{part}/{name}"
            drawn[key] = torch.cat([weighted_auc(score, wrong, rows) for rows in counts.split(CHUNK)])
            detectors[key] = {
                "auc": auc(score, wrong), "interval": interval(drawn[key]), "seconds": found["seconds"] + training,
                "own_seconds": found["seconds"], "not_finite": broken, "peer": part in PEERS,
            }  # fmt: skip
    peers = [key for key, entry in detectors.items() if entry["peer"]]
    ours = [key for key, entry in detectors.items() if not entry["peer"]]
    figures: dict[str, Any] = {"detectors": detectors, "best_ours": _best(detectors, ours)}
    if peers:
        best = _best(detectors, peers)
        for key, entry in detectors.items():
            gap = interval(drawn[key] - drawn[best])
            entry["over_best_peer"] = {"difference": entry["auc"] - detectors[best]["auc"], "interval": gap}
        figures["best_peer"] = best
    return figures


def _best(detectors: Mapping[str, Mapping[str, Any]], keys: list[str]) -> str:
    return max(keys, key=lambda key: detectors[key]["auc"])


def claims(sets: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    result = []
    for name, figures in sets.items():
        detectors, ours = figures["detectors"], figures["best_ours"]
        entry = detectors[ours]
        if name in ("digits", "cifar10"):
            result.append(_claim(f"{name}: ROC-AUC of {ours}", entry["auc"], 0.97))
        if "best_peer" in figures:
            text = f"{name}: {ours} less {figures['best_peer']}, upper end of the interval"
            result.append(_claim(text, entry["over_best_peer"]["interval"][1], 0.0))
        for key in (key for key in detectors if key.split("/")[0] in GRADIENT_PEERS):
            text = f"{name}: seconds of {key} with its training over those of {ours}"
            result.append(_claim(text, detectors[key]["seconds"] / entry["seconds"], 1.0))
    return result


def _claim(text: str, value: float, target: float) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": value >= target}


def table(name: str, figures: Mapping[str, Any]) -> str:
    """A set's figures to read, best first."""
    lines = [f"{name}: {figures['samples']} images, {figures['wrong']} wrong labels"]
    for key, entry in sorted(figures["detectors"].items(), key=lambda item: -item[1]["auc"]):
        low, high = entry["interval"]
        text = ""
        if gap := entry.get("over_best_peer"):
            text = f"  {gap['difference']:+.4f} [{gap['interval'][0]:+.4f}, {gap['interval'][1]:+.4f}]"
        lines.append(f"  {key:36s} {entry['auc']:.4f} [{low:.4f}, {high:.4f}] {entry['seconds']:8.1f} s{text}")
    return "\n".join(lines)
