"""What remains of the test accuracy when the least informative training images are left out.

EfficientNet-Lite0 with its ImageNet weights and a random head, all layers linearized, on digits and CIFAR-10. Training
means the exact optimum. From all training images, shares are removed: iteratively those with the lowest unique
information in the outputs on other images (5 % of what remains, then the scores are computed anew), the lowest and the
highest by the scores of the whole set, and at random (5 lots). By information, no class loses all its images. The
scores see neither test images nor labels of the images whose outputs they watch. The ridge is that of the best
leave-one-out accuracy of the whole set. Finished parts are kept in the work folder.

    python benchmarks/summarize.py --data DIR [--quick] [--work DIR] [--output FILE]

DIR holds cifar10/train/CLASS/*.png; the digits come with scikit-learn. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import timm
import torch
from step_cost import cpu_name
from summarize_parts import Case, build, by_lot, follow

SIZES: dict[str, dict[str, Any]] = {
    "quick": {"sets": ["digits"], "train": 24, "watched": 6, "test": 12, "side": 32, "shares": [0.0, 0.5], "lots": 2},
    "default": {
        "sets": ["digits", "cifar10"], "train": 400, "watched": 200, "test": 600, "side": 32,
        "shares": [0.0, 0.2, 0.35, 0.5, 0.65, 0.8], "lots": 5,
    },
}  # fmt: skip
JUDGED = (0.5, 0.8)


def measure(data: Path, name: str, size: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """All orders of removal of a set, those kept from before included."""
    stored = work / f"{name}.pt"
    if not stored.exists():
        torch.save(build(data, name, size), stored)
    case = Case(torch.load(stored, weights_only=True), size)

    def part(what: str, function: Callable[[], Any]) -> Any:
        file = work / f"{name}_{what}.json"
        if not file.exists():
            file.write_text(json.dumps(function()))
        found = json.loads(file.read_text())
        print(file.stem, json.dumps(found)[:400], flush=True)
        return found

    ridge, shares = part("ridge", case.choose_ridge), size["shares"]
    least = case.train - round(max(shares) * case.train)
    orders = {
        "iterative": part("iterative_order", lambda: case.order(ridge, "iterative", least)),
        "lowest": part("lowest_order", lambda: case.order(ridge, "one_shot", least)),
    }
    orders["highest"] = orders["lowest"][::-1]
    orders |= {f"random_{seed}": by_lot(case.train, seed) for seed in range(size["lots"])}
    found = {what: part(what, lambda o=order: follow(case, ridge, o, shares)) for what, order in orders.items()}
    figures: dict[str, Any] = {"ridge": ridge, **{what: found[what] for what in ("iterative", "lowest", "highest")}}
    lots = [found[f"random_{seed}"] for seed in range(size["lots"])]
    figures["random"] = [_average(rows) for rows in zip(*lots, strict=True)]
    return figures


def _average(rows: tuple[dict[str, Any], ...]) -> dict[str, Any]:
    values = [row["accuracy"] for row in rows]
    return {"share": rows[0]["share"], "accuracy": mean(values), "lowest": min(values), "highest": max(values)}


def claims(figures: Mapping[str, Any], size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    result = []
    for name in size["sets"]:
        whole = figures[name]["random"][0]["accuracy"]
        for share in JUDGED:
            where = f"{name}, {size['train']} images, {share:.0%} removed"
            left = {
                what: next(row["accuracy"] for row in figures[name][what] if row["share"] == share)
                for what in ("iterative", "lowest", "highest", "random")
            }
            result += [
                _claim(f"{where}: accuracy, iterative less random", left["iterative"] - left["random"], 0.0),
                _claim(f"{where}: accuracy, iterative less highest", left["iterative"] - left["highest"], 0.0),
                _claim(f"{where}: accuracy, iterative less lowest at once", left["iterative"] - left["lowest"], 0.0),
                _claim(f"{where}: accuracy, iterative less all images", left["iterative"] - whole, -0.02),
            ]
    return result


def _claim(text: str, value: float, target: float) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": value >= target}


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with cifar10/train")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--work", type=Path, default=Path("runs/summarize"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "quick" if options.quick else "default"
    size, work = SIZES[name], options.work / name
    work.mkdir(parents=True, exist_ok=True)
    figures = {one: measure(options.data, one, size, work) for one in size["sets"]}
    report = json.dumps({
        "benchmark": "summarize", "size": name, "sizes": size, "figures": figures,
        "claims": [] if options.quick else claims(figures, size),
        "machine": f"{cpu_name()}, one thread, shared with other programs", "date": str(datetime.date.today()),
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
    })  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
