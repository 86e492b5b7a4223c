"""How fast the linear-quadratic problem of a whole network is solved, and what ordinary fine-tuning takes beside it.

EfficientNet-Lite0 with its ImageNet weights and a random head, all layers linearized, on image folders. For each set:
the ridge by leave-one-out accuracy of the trace kernel, then conjugate gradients plain (the bias is a penalized
weight), deflated (the intercept eliminated), and preconditioned: by K-FAC, by a sketch of the Jacobian where the
products of samples and classes are few enough, and by the trace kernel in the dual; K-FAC-preconditioned SGD on the
same problem; and ordinary fine-tuning with a search over three learning rates. A step of conjugate gradients is two
sweeps over the data; a *pass* is one such step. Time is that of the process, with one thread, evaluation on validation
images left out. Finished parts are kept in the work folder.

    python benchmarks/solve.py --data DIR [--set dtd10 --set cars50] [--quick | --full] [--work DIR] [--output FILE]

DIR holds one folder per set, each with train/CLASS/*.png. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from solve_parts import TIGHT, Case, automatic_ridge, descend, descend_dual, fine_tune, stochastic

SIZES = {
    "quick": {"train": 24, "val": 12, "side": 32, "steps": 2, "epochs": 1},
    "default": {"train": 400, "val": 200, "side": 64, "steps": 60, "epochs": 15},
    "full": {"train": 5000, "val": 1000, "side": 224, "steps": 60, "epochs": 30},
}
RATES = (0.003, 0.01, 0.03)
LOOSE = 1e-3
SKETCHED = 8_000  # most rows of the Jacobian that `solver=cg` sketches by itself


def passes_to(run: dict[str, Any], tolerance: float) -> int | None:
    """Steps until the relative gradient is below a tolerance; None if it never was."""
    return next((i for i, s in enumerate(run["steps"], 1) if s["relative_gradient"] <= tolerance), None)


def seconds_to(run: dict[str, Any], tolerance: float) -> float | None:
    """Seconds until the relative gradient is below a tolerance; None if it never was."""
    return next((s["seconds"] for s in run["steps"] if s.get("relative_gradient", 1) <= tolerance), None)


def reach(run: dict[str, Any], margin: float = 0.01) -> tuple[int, float]:
    """Steps and seconds until validation accuracy is within a margin of its final value."""
    final = run["steps"][-1]["val_acc"]
    return next((i, s["seconds"]) for i, s in enumerate(run["steps"], 1) if s["val_acc"] >= final - margin)


def best(run: dict[str, Any]) -> tuple[float, float]:
    """Best validation accuracy, and the seconds to it."""
    top = max(step["val_acc"] for step in run["steps"])
    return top, next(step["seconds"] for step in run["steps"] if step["val_acc"] == top)


def summarize(parts: dict[str, Any]) -> dict[str, Any]:
    """The figures of one set."""
    runs = {name: part for name, part in parts.items() if name != "ridge" and not name.startswith("finetune")}
    tuned = {name: part for name, part in parts.items() if name.startswith("finetune")}
    figures: dict[str, Any] = {"ridge": parts["ridge"], "runs": {}}
    for name, run in runs.items():
        steps, seconds = reach(run)
        figures["runs"][name] = {
            "passes_to_1e-3": passes_to(run, LOOSE) if "relative_gradient" in run["steps"][0] else None,
            "passes_to_1e-4": passes_to(run, TIGHT) if "relative_gradient" in run["steps"][0] else None,
            "seconds_to_1e-3": seconds_to(run, LOOSE),
            "relative_gradient_at_20": next((s.get("relative_gradient") for s in run["steps"][19:20]), None),
            "final_relative_gradient": run["steps"][-1].get("relative_gradient"), "passes": len(run["steps"]),
            "final_objective": run["steps"][-1].get("objective"), "final_val_acc": run["steps"][-1]["val_acc"],
            "steps_to_accuracy": steps, "seconds_to_accuracy": seconds, "setup_seconds": run["setup"],
            "seconds_per_pass": (run["steps"][-1]["seconds"] - run["setup"]) / len(run["steps"]),
        }  # fmt: skip
    winner = max(tuned, key=lambda name: best(tuned[name])[0])
    figures["finetune"] = {
        "val_acc": best(tuned[winner])[0], "seconds_one_run": best(tuned[winner])[1], "rate": winner.split("_")[1],
        "seconds_search": sum(run["steps"][-1]["seconds"] for run in tuned.values()),
        "by_rate": {name.split("_")[1]: best(run)[0] for name, run in tuned.items()},
    }  # fmt: skip
    return figures


def claims(name: str, figures: dict[str, Any]) -> list[dict[str, Any]]:
    """Targets of one set."""
    runs, tuned = figures["runs"], figures["finetune"]
    kind = "sketch" if "sketch" in runs else "kfac_expand_10"
    chosen = runs[kind]
    passes = chosen["passes_to_1e-3"]
    whole = figures["ridge"]["seconds"] + chosen["seconds_to_accuracy"]
    ratio = whole / tuned["seconds_search"]
    certified = figures["ridge"]["seconds"] + chosen["seconds_to_1e-3"] if passes else None
    above = chosen["final_objective"] / runs["sgd"]["final_objective"]
    return [
        _claim(f"{name}: passes of conjugate gradients to 1e-3 ({kind})", passes, 20),
        _claim(f"{name}: passes to within .01 of the final validation accuracy", chosen["steps_to_accuracy"], 5),
        _claim(f"{name}: time to that accuracy, ridge included, over fine-tuning with its search", ratio, 1.0),
        _claim(
            f"{name}: the same to the certificate of 1e-3, which needs no hindsight",
            certified and certified / tuned["seconds_search"],
            1.0,
        ),
        _claim(f"{name}: final objective over that of SGD", above, 1.0),
    ]


def _claim(text: str, value: float | None, target: float) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": value is not None and value <= target}


def measure(folder: Path, size: dict[str, int], work: Path) -> dict[str, Any]:
    """All parts of one set, those kept from before included."""
    case: Case | None = None
    parts: dict[str, Any] = {}

    def part(name: str, function: Callable[[Case], Any]) -> Any:
        nonlocal case
        file = work / f"{name}.json"
        if not file.exists():
            case = case or Case(folder, size)
            result = function(case)
            file.write_text(json.dumps(result))
        parts[name] = json.loads(file.read_text())
        print(folder.name, name, json.dumps(parts[name])[:200], flush=True)
        return parts[name]

    steps, epochs = size["steps"], size["epochs"]
    ridge = part("ridge", automatic_ridge)["ridge"]
    for rate in RATES:
        part(f"finetune_{rate}", lambda case, rate=rate: fine_tune(case, rate, epochs))
    rows = size["train"] * len(list((folder / "train").iterdir()))
    if rows <= SKETCHED:
        part("sketch", lambda c: descend(c, ridge, steps, sketch=4))
    part("kfac_expand_10", lambda c: descend(c, ridge, steps, kfac={"form": "expand", "cotangents": "random"}))
    part("deflated", lambda c: descend(c, ridge, steps))
    part("sgd", lambda c: stochastic(c, ridge, epochs))
    part("dual_trace", lambda c: descend_dual(c, ridge, min(30, steps)))
    if rows <= SKETCHED:
        part("plain", lambda c: descend(c, ridge, steps, intercept=False))
        for form, factor in (("expand", 1.0), ("reduce", 10.0), ("reduce", 1.0)):
            options = {"form": form, "cotangents": "random", "factor": factor}
            part(f"kfac_{form}_{factor:g}", lambda c, o=options: descend(c, ridge, min(20, steps), kfac=o))
    return summarize(parts)


def main() -> None:
    """Run all sets and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with one folder per set")
    parser.add_argument("--set", action="append", default=[], help="names of sets; default: dtd10 and cars50")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--full", action="store_true", help="for a GPU: 224 pixels, 5000 images")
    parser.add_argument("--work", type=Path, default=Path("runs/solve"))
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = "quick" if options.quick else "full" if options.full else "default"
    sets = {}
    for name in options.set or ["dtd10", "cars50"]:
        work = options.work / size / name
        work.mkdir(parents=True, exist_ok=True)
        sets[name] = measure(options.data / name, SIZES[size], work)
    report = {
        "benchmark": "solve", "size": size, "sizes": SIZES[size], "sets": sets,
        "claims": [] if options.quick else [claim for name, found in sets.items() for claim in claims(name, found)],
        "machine": f"{platform.processor() or platform.machine()}, one thread", "date": str(datetime.date.today()),
        "torch": torch.__version__, "timm": timm.__version__,
    }  # fmt: skip
    if options.output:
        options.output.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
