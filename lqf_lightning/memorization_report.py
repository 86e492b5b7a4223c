"""From the runs of a sweep over random subsets to what is memorized, and what decides about which test sample."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from torch import Tensor

from lqf_lightning.data.table_file import write_table
from lqf_lightning.information.memorization import (
    Memorization,
    influence,
    memorization,
    refuse_threshold,
    worst_standard_error,
)
from lqf_lightning.memorization_runs import SubsetRuns, read_runs
from lqf_lightning.run_folder import write_json


def reduce_runs(folder: Path, output: Path, *, threshold: float | None = None, top: int = 1000) -> dict[str, Any]:
    """Write ``memorization.parquet``, ``influence.parquet``, ``memorization.json`` and a picture.

    Args:
        folder: Of a multirun with ``callbacks=[memorization]``; all runs below it are read.
        output: Where to write.
        threshold: Memorization from which a training sample counts as memorized, such as 0.25; None: none does.
        top: Pairs of a training and a test sample that are listed, those of largest influence; with a threshold, only
            memorized training samples.

    Returns:
        Numbers of runs and samples, their noise, and with a threshold how many samples are memorized. Refusals are
        those of `read_runs` and `refuse_threshold`.
    """
    runs = read_runs(folder)
    if threshold is not None:
        refuse_threshold(len(runs.mask), runs.ratio, threshold)
    found = memorization(runs.mask, runs.correct)
    table = tabulate_memorization(runs.train, found, threshold)
    output.mkdir(parents=True, exist_ok=True)
    write_table(table, output / "memorization.parquet")
    rows = np.flatnonzero(table["memorized"]) if threshold is not None else np.arange(len(table))
    write_table(strongest_pairs(runs, rows, top), output / "influence.parquet")
    report = _report(runs, table, threshold)
    write_json(output / "memorization.json", report)
    pictures = output / "pictures"
    pictures.mkdir(exist_ok=True)
    draw_memorization(table, report).savefig(pictures / "memorization.png", dpi=120)
    return report


def tabulate_memorization(train: pd.DataFrame, found: Memorization, threshold: float | None = None) -> pd.DataFrame:
    """One row per training sample, in order of index.

    Args:
        train: Rows of the manifest (N).
        found: Of these.
        threshold: Memorization from which a sample counts as memorized.

    Returns:
        `index`, `path`, `label`, `class`, `memorization`, `standard_error`, `worst_standard_error`, `accuracy_in` (of
        runs trained on the sample), `c_score` (of the others), `runs_in`, `runs_out`; `memorized` if there is a
        threshold.
    """
    table = train[["index", "path", "label", "class"]].copy()
    for name in ("memorization", "standard_error", "worst_standard_error"):
        table[name] = getattr(found, name).numpy()
    table["accuracy_in"], table["c_score"] = found.seen.numpy(), found.c_score.numpy()
    table["runs_in"], table["runs_out"] = found.runs_in.numpy(), found.runs_out.numpy()
    if threshold is not None:
        table["memorized"] = table["memorization"] >= threshold
    return table


def strongest_pairs(runs: SubsetRuns, rows: np.ndarray, top: int) -> pd.DataFrame:
    """The pairs of a training and another sample with the largest influence, without keeping the others.

    Args:
        runs: What they get right.
        rows: Training samples that take part, by position (K,).
        top: Most pairs.

    Returns:
        `influence`, its `standard_error`, and `index`, `path` and `class` of both, `train_...` and `other_...`, the
        strongest pairs first.
    """
    kept: list[Tensor] = [torch.zeros(0, 4, dtype=torch.float64)]
    for block in influence(runs.mask[:, rows], runs.correct_other):
        values = block.influence.nan_to_num(-torch.inf).flatten()
        best = values.topk(min(top, len(values)))
        other, position = best.indices // max(1, len(rows)), best.indices % max(1, len(rows))
        error = block.standard_error.flatten()[best.indices]
        both = torch.stack([best.values, error, other + block.rows.start, position], 1)
        merged = torch.cat([kept[0], both[best.values.isfinite()]])
        kept = [merged[merged[:, 0].argsort(descending=True, stable=True)][:top]]
    pairs = kept[0].numpy()
    table = pd.DataFrame({"influence": pairs[:, 0], "standard_error": pairs[:, 1]})
    ends = (("train", runs.train, rows[pairs[:, 3].astype(int)]), ("other", runs.others, pairs[:, 2].astype(int)))
    for prefix, samples, chosen in ends:
        for name in ("index", "path", "class"):
            table[f"{prefix}_{name}"] = samples[name].to_numpy()[chosen]
    return table


def draw_memorization(table: pd.DataFrame, report: Mapping[str, Any]) -> Figure:
    """How much of the samples is memorized, beside the noise, and which samples.

    Args:
        table: As of `tabulate_memorization`.
        report: As of `reduce_runs`.

    Returns:
        A figure of two panels.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2)
    noise = report["worst_standard_error"]
    left.hist(table["memorization"].dropna(), bins=np.linspace(-1, 1, 41))
    left.axvspan(-noise, noise, color="C3", alpha=0.15, label=f"noise: one standard error, up to about {noise:.3f}")
    left.set(xlabel="memorization", ylabel="training samples", yscale="log")
    left.legend(fontsize="small")
    right.scatter(table["c_score"], table["accuracy_in"], s=6, alpha=0.3)
    right.plot([0, 1], [0, 1], color="gray", linewidth=1)
    right.set(xlabel="right without it in training (C-score)", ylabel="right with it", xlim=(-0.02, 1.02))
    figure.suptitle(f"{report['runs']} runs on {report['ratio']:g} of {report['samples']} samples", fontsize="medium")
    return figure


def _report(runs: SubsetRuns, table: pd.DataFrame, threshold: float | None) -> dict[str, Any]:
    number = len(runs.mask)
    report: dict[str, Any] = {
        "runs": number,
        "ratio": runs.ratio,
        "samples": len(table),
        "others": len(runs.others),
        "worst_standard_error": worst_standard_error(number, runs.ratio),
        "undefined": int(table["memorization"].isna().sum()),
    }
    for name in ("memorization", "standard_error", "c_score"):
        mean = float(table[name].mean())
        report[f"mean_{name}"] = None if np.isnan(mean) else mean
    if threshold is not None:
        report |= {"threshold": threshold, "memorized": int(table["memorized"].sum())}
    return report
