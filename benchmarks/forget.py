"""What it costs to forget 1 % of the training samples, ten times in a row, and how near that comes to retraining.

EfficientNet-Lite0 with its ImageNet weights and a random head, all layers linearized, squared loss, penalty on all
weights. On dtd10 the kernel of all training samples is known: a request factors what is left of it. On cifar10 there is
no room for a kernel: a request goes on with conjugate gradients from the weights that are there, until the bound on the
distance from the optimum is again what it was. Every result is held against retraining without the samples: on dtd10
for three heads, on cifar10 by the same solver from zero to the same bound, after the first and the last request. One
pass is the work of a training step for every sample: 5 evaluations of the network; `J v` takes 3 of them, `J^T r` 3.
Time is that of the process with one thread. Finished parts are kept in the work folder.

    python benchmarks/forget.py --data DIR [--quick] [--work DIR] [--output FILE]

DIR holds dtd10/{train,test}/CLASS and cifar10/{train,test}/CLASS. The last line printed is one JSON object.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from forget_figures import claims, descent_figures, kernel_figures
from forget_kernel import scrub_by_kernel
from forget_parts import Case, kept_solution, requests, solve_by_descent, without
from written_report import write_report

SIZES: dict[str, dict[str, Any]] = {
    "quick": {
        "dtd10": {
            "train": 48, "trained": 40, "test": 20, "side": 32, "seeds": 2, "requests": 3, "shadows": 12,
        },
        "cifar10": {
            "train": 60, "test": 40, "side": 32, "requests": 2, "mu": 0.5, "tolerance": 0.1, "retrained": [1, 2],
            "most": 40,
        },
    },
    "default": {
        "dtd10": {
            "train": 720, "trained": 640, "test": 460, "side": 64, "seeds": 3, "requests": 10, "shadows": 64,
        },
        "cifar10": {
            "train": 5000, "test": 1000, "side": 32, "requests": 10, "mu": 0.5, "tolerance": 0.01,
            "retrained": [1, 10], "most": 100,
        },
    },
}  # fmt: skip


def scrub_by_descent(case: Case, size: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """Train, then answer all requests by conjugate gradients; retrain after some of them."""
    gone, entries = requests(case.samples, 0.01, size["requests"]), []
    everything = torch.arange(case.samples)
    zero_bound = solve_by_descent(case, everything, size["mu"], None, float("inf"), 0)["distance_bound"]
    bound = size["tolerance"] * zero_bound
    print(f"at zero |dw - dw*| <= {zero_bound:.4g}; wanted: {bound:.4g}", flush=True)
    base = kept_solution(work / "base", lambda: solve_by_descent(case, everything, size["mu"], None, bound, 10**3))
    weights = base["movement"]
    entries.append(base)
    for k in range(1, size["requests"] + 1):
        kept = without(case.samples, gone[:k])
        scrubbed = kept_solution(
            work / f"scrub_{k}",
            lambda kept=kept, weights=weights: solve_by_descent(case, kept, size["mu"], weights, bound, size["most"]),
        )
        weights = scrubbed["movement"]
        if k in size["retrained"]:
            kept_solution(
                work / f"retrain_{k}",
                lambda kept=kept: solve_by_descent(case, kept, size["mu"], None, bound, 10**3),
            )
        entries.append(scrubbed)
        print(k, {name: value for name, value in scrubbed.items() if name not in ("movement", "curve")}, flush=True)
    return entries


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dtd10 and cifar10")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--work", type=Path, default=Path("runs/forget"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "quick" if options.quick else "default"
    size, work = SIZES[name], options.work / name
    work.mkdir(parents=True, exist_ok=True)
    for part in SIZES[name]:
        (work / part).mkdir(exist_ok=True)
    case = Case(options.data / "cifar10", size["cifar10"])
    entries = scrub_by_descent(case, size["cifar10"], work / "cifar10")
    figures = {
        "dtd10": kernel_figures(scrub_by_kernel(options.data / "dtd10", size["dtd10"], work / "dtd10")),
        "cifar10": descent_figures(case, size["cifar10"], work / "cifar10", entries[1:])
        | {"base": _plain(entries[0]), "retrained": retrainings(size["cifar10"], work / "cifar10")},
    }
    report = {
        "benchmark": "forget", "size": name, "sizes": size, "figures": figures,
        "claims": [] if options.quick else claims(figures),
    }  # fmt: skip
    write_report(report, options.output)


def retrainings(size: dict[str, Any], work: Path) -> list[dict[str, Any]]:
    """What retraining from zero took."""
    return [_plain(json.loads((work / f"retrain_{k}.json").read_text())) for k in size["retrained"]]


def _plain(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: entry[name] for name in ("passes", "steps", "seconds", "distance_bound")}


if __name__ == "__main__":
    main()
