"""Tables and claims of `eman.py` from the metrics of its runs."""

import statistics
from collections.abc import Iterable
from typing import Any

_PAPER = {"fixmatch": 0.07, "moco": 0.04, "byol": 0.04}  # gains with few labels: 1 % of ImageNet


def rows(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Means over seeds, one row per data set, number of labels, method and teacher."""
    found = []
    for key, group in _grouped(run for run in runs if "probe" not in run).items():
        probes = [run for run in runs if "probe" in run and _key(run) == key]
        students = [run for run in probes if run["probe"] == "student"] or group
        found.append({
            **dict(zip(("data", "labels", "method", "teacher"), key, strict=True)),
            "seeds": len(group),
            "student_acc": _mean(group, "test/acc"),
            "teacher_acc": _mean(group, "test/teacher_acc"),
            "student_acc_by_seed": [run["metrics"]["test/acc"] for run in group],
            "teacher_acc_by_seed": [run["metrics"].get("test/teacher_acc") for run in group],
            "knn_acc": _mean(group, "test/knn_acc"),
            "teacher_knn_acc": _mean(group, "test/teacher_knn_acc"),
            "probe_acc": _mean(students, "test/linear_probe_acc"),
            "teacher_probe_acc": _mean([run for run in probes if run["probe"] == "teacher"], "test/linear_probe_acc"),
            "selected": _mean(group, "train/selected"),
            "seconds": statistics.fmean(run["seconds"] for run in group),
        })
    return found


def claims(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """EMAN against batch statistics, and against the labels alone, each by the better of student and teacher."""
    best = {key: statistics.fmean(map(_score, group)) for key, group in _grouped(runs).items()}
    found = []
    for (data, labels, method, teacher), score in best.items():
        if teacher != "eman":
            continue
        where = f"{method} on {data}" + (f", {labels} labels a class" if isinstance(labels, int) else "")
        for other, least in (("ema", _PAPER[method]), ("ema_copied", 0.0), ("null", 0.0)):
            if (gain := _gain(best, score, (data, labels, method, other))) is not None:
                found.append(_claim(f"{where}: accuracy with eman over {other}", gain, least))
        if (gain := _gain(best, score, (data, labels, "untrained", "none"))) is not None:
            found.append(_claim(f"{where}: nearest neighbors with eman over an untrained network", gain, 0.0))
        if (gain := _gain(best, score, (data, labels, "finetune", "none"))) is not None:
            found.append(_claim(f"{where}: accuracy with eman over fine-tuning on the labels alone", gain, 0.0))
    return found


def _claim(text: str, value: float, target: float) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": f">= {target}", "holds": value >= target and value > 0}


def _gain(best: dict[tuple[Any, ...], float], score: float, key: tuple[Any, ...]) -> float | None:
    return score - best[key] if key in best else None


def _score(run: dict[str, Any]) -> float:
    # Without labels, what nearest neighbors make of the features; otherwise test accuracy.
    metrics = run["metrics"]
    names = ("test/knn_acc", "test/teacher_knn_acc") if "test/knn_acc" in metrics else ("test/acc", "test/teacher_acc")
    return max(metrics[name] for name in names if name in metrics)


def _key(run: dict[str, Any]) -> tuple[Any, ...]:
    return run["data"], run.get("labels"), run["method"], run["teacher"]


def _grouped(runs: Iterable[dict[str, Any]]) -> dict[tuple[Any, ...], list[dict[str, Any]]]:
    groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
    for run in runs:
        if "probe" not in run:
            groups.setdefault(_key(run), []).append(run)
    return groups


def _mean(runs: list[dict[str, Any]], name: str) -> float | None:
    values = [run["metrics"][name] for run in runs if name in run["metrics"]]
    return statistics.fmean(values) if values else None
