"""How well the number of training steps is foretold by the kernel, and what that costs next to training.

EfficientNet-Lite0 with its ImageNet weights and a random head, all layers, on dtd10 and cifar10 (10 classes). Learning
rate, batch size, momentum, weight decay and schedule are drawn by lot. Every draw is trained and predicted, with the
same batches: fine-tuning by the cross-entropy with batch-norm statistics frozen, a few draws with batch statistics, and
LQF by the squared loss on all samples or in batches. A threshold is reached at the first step from which on the loss,
averaged over an epoch, stays at or below a fraction of that before training; errors are |predicted - measured| /
measured, over thresholds that both reach. One kernel serves all draws. Time is that of the process with one thread on a
CPU, the wall clock on a GPU. Finished parts are kept in the work folder.

    python benchmarks/training_time.py --data DIR [--quick] [--work DIR] [--output FILE]

DIR holds dtd10/train/CLASS and cifar10/train/CLASS. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import timm
import torch
from step_cost import cpu_name
from training_time_parts import Case, compare, draw_setting

SETS = ("dtd10", "cifar10")
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"samples": 16, "side": 32, "steps": 8, "lqf_steps": 8, "frozen": 2, "batch_norm": 1, "lqf": 2},
    "default": {"samples": 100, "side": 48, "steps": 100, "lqf_steps": 60, "frozen": 20, "batch_norm": 3, "lqf": 4},
}


def run(data: Path, size: Mapping[str, Any], work: Path) -> list[dict[str, Any]]:
    """All draws of both sets, those kept from before included."""
    found = []
    for name in SETS:
        case: Case | None = None
        for kind in ("frozen", "lqf", "batch_norm"):
            for number in range(size[kind]):
                file = work / f"{name}_{kind}_{number}.json"
                if not file.exists():
                    case = case or Case(data / name / "train", size, work / f"{name}_kernel.pt")
                    linear = kind == "lqf"
                    whole = number % 2 == 0 if linear else None
                    steps = size["lqf_steps" if linear else "steps"]
                    setting = draw_setting(number, size["samples"], steps, linear, whole=whole)
                    entry = {"set": name, "collected": case.collected()["seconds"], **compare(case, setting, kind)}
                    file.write_text(json.dumps(entry))
                found.append(json.loads(file.read_text()))
                print(json.dumps(found[-1])[:400], flush=True)
    return found


def errors(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Relative errors over draws and thresholds, and how often only one of the two gets there."""
    rows = [row for entry in entries for row in entry["rows"]]
    both = [row for row in rows if row["measured"] and row["predicted"] is not None]
    values = torch.tensor([abs(r["predicted"] - r["measured"]) / r["measured"] for r in both], dtype=torch.float64)
    one = sum((row["measured"] is None) != (row["predicted"] is None) for row in rows)
    result: dict[str, Any] = {
        "draws": len(entries),
        "thresholds": len(rows),
        "reached_by_both": len(both),
        "by_one": one,
    }
    if len(values):
        result |= {"median": float(values.median()), "percentile_95": float(values.quantile(0.95))}
    return result


def summarize(entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The figures, by set and kind of training."""
    figures: dict[str, Any] = {}
    for name in SETS:
        own = [entry for entry in entries if entry["set"] == name]
        kinds = {kind: [entry for entry in own if entry["kind"] == kind] for kind in ("frozen", "batch_norm", "lqf")}
        figures[name] = {kind: errors(some) for kind, some in kinds.items()}
        momentum = {
            str(m): errors([e for e in kinds["frozen"] if e["setting"]["momentum"] == m]) for m in (0.0, 0.5, 0.9)
        }
        figures[name]["frozen_by_momentum"] = momentum
        figures[name]["lqf"]["largest_loss_error"] = max(entry["largest_loss_error"] for entry in kinds["lqf"])
        figures[name]["lqf"]["equal_steps"] = all(
            row["predicted"] == row["measured"] for entry in kinds["lqf"] for row in entry["rows"]
        )
        trained = [entry["seconds"]["trained"] for entry in kinds["frozen"]]
        told = own[0]["collected"] + sum(entry["seconds"]["predicted"] for entry in kinds["frozen"])
        figures[name]["seconds"] = {
            "collected": own[0]["collected"], "predictions": told - own[0]["collected"], "trainings": sum(trained),
            "trainings_over_all": sum(trained) / told, "one_training_over_all": sum(trained) / len(trained) / told,
        }  # fmt: skip
    return figures


def claims(figures: Mapping[str, Any], size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    result = []
    for name in SETS:
        where = f"{name}, n = {size['samples']}, {size['side']} px"
        own = figures[name]
        result += [
            _claim(f"{where}: fine-tuning, median relative error of steps", own["frozen"].get("median"), 0.2),
            _claim(
                f"{where}: lqf, thresholds with another number of steps", 0.0 if own["lqf"]["equal_steps"] else 1.0, 0
            ),
            _claim(
                f"{where}: 20 trainings over kernel and 20 predictions", own["seconds"]["trainings_over_all"], 30, True
            ),
        ]
    return result


def _claim(text: str, value: float | None, target: float, least: bool = False) -> dict[str, Any]:
    holds = value is not None and (value >= target if least else value <= target)
    return {"claim": text, "value": value, "target": target, "holds": holds}


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dtd10/train and cifar10/train")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--work", type=Path, default=Path("runs/training_time"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "quick" if options.quick else "default"
    size, work = SIZES[name], options.work / name
    work.mkdir(parents=True, exist_ok=True)
    figures = summarize(run(options.data, size, work))
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = json.dumps({
        "benchmark": "training_time", "size": name, "sizes": size, "figures": figures,
        "claims": [] if options.quick else claims(figures, size),
        "machine": gpu or f"{cpu_name()}, one thread, shared with other programs", "date": str(datetime.date.today()),
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
    })  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
