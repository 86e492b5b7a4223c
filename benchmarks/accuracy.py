"""What LQF, ordinary fine-tuning and a linear probe reach on real images, by running `lqf-train` itself.

Each case is one process of `lqf-train`, so the figures are those that a user gets; finished cases are kept in the work
folder, and an interrupted benchmark goes on where it was. Without `--folder` it runs the quick-start digits, which need
no download.

    python benchmarks/accuracy.py [--quick] [--folder NAME=PATH:IMAGE_SIZE ...] [--backbone NAME[=OVERRIDE,...] ...]
                                  [--epochs N] [--work DIR] [--output benchmarks/results/accuracy.json]

The last line printed is one JSON object.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import lightning
import timm
import torch

METHODS = ("finetune", "lqf")


def case_overrides(options: argparse.Namespace) -> dict[str, list[str]]:
    """The Hydra overrides of every combination of data and backbone, by a name for it."""
    data = {"digits": ["data=digits"]}
    for entry in options.folder:
        name, _, rest = entry.partition("=")
        path, _, size = rest.rpartition(":")
        data[name] = ["data=folder", f"data.source.root={Path(path).absolute()}", f"data.image_size={size}"]
    backbones = {
        name: extra.split(",") if extra else [] for name, _, extra in (e.partition("=") for e in options.backbone)
    }
    return {
        f"{backbone}/{name}": [*overrides, f"backbone={backbone}", *extra]
        for backbone, extra in backbones.items()
        for name, overrides in data.items()
    }


def run_case(folder: Path, overrides: list[str]) -> dict[str, Any]:
    """Train and test once; a folder with final metrics is not run again."""
    metrics = folder / "metrics.json"
    if not (metrics.exists() and "test/acc" in json.loads(metrics.read_text())):
        command = [sys.executable, "-m", "lqf_lightning.train", *overrides, f"hydra.run.dir={folder}"]
        quiet = ["logger=csv", "progress=none", "callbacks=[learning_curves,linear_probe]"]
        subprocess.run([*command, *quiet], check=True, stdout=subprocess.DEVNULL)
    written = json.loads(metrics.read_text())
    return {
        "test_acc": written["test/acc"], "val_acc": written["val/acc"],
        "probe_test_acc": written["test/linear_probe_acc"],
        "ece": written["test/ece"], "fit_seconds": written["time/fit_s"],
    }  # fmt: skip


def claims(cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """What the documentation says of the quick start."""
    digits = cases.get("efficientnet_lite0/digits")
    if digits is None:
        return []
    error, probe = 1 - digits["lqf"]["test_acc"], 1 - digits["lqf"]["probe_test_acc"]
    return [
        {
            "claim": "quick start: test error of LQF over that of the linear probe", "value": error / probe,
            "target": 0.7, "holds": error / probe <= 0.7,
        },
        {
            "claim": "quick start: minutes of training and evaluation", "value": digits["lqf"]["fit_seconds"] / 60,
            "target": 5.0, "holds": digits["lqf"]["fit_seconds"] / 60 <= 5.0,
        },
    ]  # fmt: skip


def main() -> None:
    """Run all cases and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: a tenth of the digits, one epoch, no claims")
    parser.add_argument("--folder", action="append", default=[], help="NAME=PATH:IMAGE_SIZE of an image folder tree")
    parser.add_argument("--backbone", action="append", default=[], help="a config of ours, with overrides after '='")
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/accuracy"))
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    options.backbone = options.backbone or ["efficientnet_lite0"]
    shared = [f"trainer.max_epochs={1 if options.quick else options.epochs}"]
    shared += ["data.subset_ratio=0.1", "data.image_size=32"] if options.quick else []
    cases: dict[str, dict[str, Any]] = {}
    for name, overrides in case_overrides(options).items():
        cases[name] = {}
        for method in METHODS:
            folder = (options.work / ("quick" if options.quick else "full") / name / method).absolute()
            cases[name][method] = run_case(folder, [*overrides, *shared, f"method={method}"])
            print(name, method, json.dumps(cases[name][method]), flush=True)
    report = {
        "benchmark": "accuracy", "quick": options.quick, "epochs": options.epochs, "cases": cases,
        "claims": [] if options.quick else claims(cases), "torch": torch.__version__, "timm": timm.__version__,
        "lightning": lightning.__version__, "threads": torch.get_num_threads(),
    }  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
