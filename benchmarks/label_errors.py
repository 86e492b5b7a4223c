"""How well wrong labels are found, and at what cost, beside cleanlab, TRAK and EK-FAC.

A tenth of the labels of four sets of real images is replaced by another class, drawn evenly; every detector ranks the
samples, and is judged by the ROC-AUC of the wrong ones, with 95 % bootstrap intervals (the same resamples for all, so
that differences are paired). EfficientNet-Lite0 with its ImageNet weights throughout:

- last_layer, trace_2, exact: leave-one-out of the linearized network by the kernel of the last layer, of all layers by
  two random combinations of the outputs, and of all layers exactly (where it is affordable). The ridge is the one with
  the least squared leave-one-out error on the labels as they are; true labels are used for the AUC only.
- training: ordinary training of all layers (AdamW), what its epochs said, and the loss at its end.
- cleanlab: its label quality from held-out probabilities of a logistic regression on the same features.
- trak, ekfac: self-influence in the network that `training` gave; seconds include that training.

Seconds are end to end from images in memory, of the process with one thread. Image sizes were chosen by the last layer
on other wrong labels (--noise 1 and 2). Finished parts are kept in the work folder.

    python benchmarks/label_errors.py --data DIR [--quick] [--sets ...] [--parts ...] [--work DIR] [--output FILE]

DIR holds cifar10, dtd10 and cars50, each with train/CLASS/*.png and test/CLASS/*.png. Peers that are not installed are
left out, and with them the claims about them. The last line printed is one JSON object.
"""

import argparse
import datetime
import importlib.util
import json
import platform
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from label_errors_figures import claims, judge_set, table
from label_errors_parts import Case, Part, fine_tune, last_layer, tangent_kernel
from label_errors_peers import cleanlab_quality, ekfac, trak
from step_cost import cpu_name

SIZES: dict[str, dict[str, dict[str, int]]] = {
    "quick": {
        "digits": {"train": 60, "other": 8, "side": 32, "epochs": 2, "exact": 1},
        "dtd10": {"train": 40, "other": 8, "side": 32, "epochs": 2, "exact": 0},
    },
    "default": {
        "digits": {"train": 1438, "other": 100, "side": 64, "epochs": 6, "exact": 0},
        "dtd10": {"train": 720, "other": 100, "side": 128, "epochs": 6, "exact": 1},
        "cars50": {"train": 1233, "other": 100, "side": 128, "epochs": 6, "exact": 0},
        "cifar10": {"train": 2000, "other": 100, "side": 128, "epochs": 6, "exact": 0},
    },
}
# Cheap parts first, so that a run that is stopped has said the most.
PARTS: dict[str, Callable[[Case], Part]] = {
    "last_layer": last_layer, "cleanlab": cleanlab_quality, "training": fine_tune, "ekfac": ekfac,
    "trace_2": partial(tangent_kernel, name="trace_2"), "exact": partial(tangent_kernel, name="exact"), "trak": trak,
}  # fmt: skip
PACKAGES = {"cleanlab": "cleanlab", "ekfac": "kronfluence", "trak": "trak"}


def parts_of(size: dict[str, int]) -> list[str]:
    """Which parts a set takes with the packages that there are."""
    there = [name for name in PARTS if name not in PACKAGES or importlib.util.find_spec(PACKAGES[name])]
    return [name for name in there if name != "exact" or size["exact"]]


def measure(data: Path, name: str, size: dict[str, int], noise: int, part: str, work: Path) -> None:
    """Run one part of one set, unless it has been; every part starts from a network of its own."""
    file = work / f"{part}.json"
    if file.exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    case = Case(data, name, size, noise, work)
    found = PARTS[part](case)
    file.write_text(json.dumps({**found, "wrong": case.wrong.tolist()}))
    summary = {key: value for key, value in found.items() if key != "scores"}
    print(name, part, json.dumps(summary), flush=True)


def summarize(size: dict[str, int], work: Path) -> dict[str, Any]:
    """The figures of a set from its parts."""
    files = {part: work / f"{part}.json" for part in parts_of(size)}
    parts = {part: json.loads(file.read_text()) for part, file in files.items() if file.exists()}
    wrong = torch.tensor(next(iter(parts.values()))["wrong"])
    notes = {
        part: {key: value for key, value in found.items() if key not in ("scores", "wrong")}
        for part, found in parts.items()
    }
    return {"samples": len(wrong), "wrong": int(wrong.sum()), "parts": notes, **judge_set(parts, wrong)}


def run(data: Path, size: str, noise: int, names: Sequence[str], chosen: Sequence[str], work: Path) -> dict[str, Any]:
    """The chosen parts of all sets, part by part, and the figures of all that have been measured."""
    folders = {name: work / f"{size}_{noise}" / name for name in names}
    sizes = {name: SIZES[size][name] for name in names}
    for part in chosen:
        for name in names:
            if part in parts_of(sizes[name]):
                measure(data, name, sizes[name], noise, part, folders[name])
    return {name: summarize(sizes[name], folders[name]) for name in names}


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10, dtd10 and cars50")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--sets", nargs="+", help="only these")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), help="only these; `training` before its readers")
    parser.add_argument("--noise", type=int, default=0, help="seed of the wrong labels; 0 is the one reported")
    parser.add_argument("--work", type=Path, default=Path("runs/label_errors"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = "quick" if options.quick else "default"
    names, chosen = options.sets or list(SIZES[size]), options.parts or list(PARTS)
    sets = run(options.data, size, options.noise, names, chosen, options.work)
    for name, figures in sets.items():
        print(table(name, figures))
    report = json.dumps({
        "benchmark": "label_errors", "size": size, "sizes": SIZES[size], "noise": options.noise, "figures": sets,
        "claims": [] if options.quick else claims(sets),
        "machine": f"{cpu_name()}, one thread, shared with other programs", "date": str(datetime.date.today()),
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
        "peers": {name: package for name, package in PACKAGES.items() if importlib.util.find_spec(package)},
    })  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
