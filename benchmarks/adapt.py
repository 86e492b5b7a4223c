"""What `lqf-adapt` makes of EfficientNet-Lite0: a linear probe on its features before the swap, after it, and adapted.

The network is adapted by the command itself, on the training images of all folders pooled, without their labels. The
probe is a ridge regression on penultimate features whose ridge a fifth of the training images chooses. Finished parts
are kept in the work folder, and an interrupted benchmark goes on where it was.

    python benchmarks/adapt.py --folder NAME=PATH [...] [--probe NAME ...] [--size 64] [--slope 0.1] [--epochs N]
                               [--quick] [--work DIR] [--weights FILE.safetensors] [--output FILE] [OVERRIDE ...]

A folder holds train/ and test/, each with a folder per class. The last line printed is one JSON object.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from images_from_folder import load_folder
from safetensors import safe_open
from torch import Tensor
from written_report import write_report

from lqf_lightning.backbones import Backbone, create_backbone
from lqf_lightning.backbones.features import penultimate_features
from lqf_lightning.linear import RidgeProbe

NETWORK = "tf_efficientnet_lite0"
RIDGES = (1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)
Split = tuple[Tensor, Tensor]


def pool(folders: dict[str, Path], work: Path, most: int | None) -> Path:
    """One folder of the training images of all, by links."""
    root = work / "images"
    for name, folder in folders.items():
        for kind in sorted(path for path in (folder / "train").iterdir() if path.is_dir()):
            place = root / "train" / f"{name}_{kind.name}"
            place.mkdir(parents=True, exist_ok=True)
            for file in sorted(kind.iterdir())[:most]:
                if not (place / file.name).exists():
                    os.symlink(file.absolute(), place / file.name)
    # The data set has a test split, so that all images here are training images; adapting looks at none of it.
    if not (root / "test").exists():
        os.symlink(root / "train", root / "test")
    return root


def adapt(options: argparse.Namespace, root: Path, weights: Path, epochs: int) -> float:
    """Run the command, unless its file is there; gives the seconds of processor time that it took."""
    noted = options.work / "seconds.json"
    spent = json.loads(noted.read_text())["seconds"] if noted.exists() else 0.0
    if weights.exists():
        return spent
    command = [
        sys.executable, "-m", "lqf_lightning.adapt", f"data.source.root={root}", f"data.image_size={options.size}",
        "backbone=efficientnet_lite0", f"slope={options.slope}", f"trainer.max_epochs={epochs}", "data.num_workers=0",
        "progress=none", "logger=[csv]", f"output={weights.absolute()}", f"hydra.run.dir={options.work / 'run'}",
        *options.overrides,
    ]  # fmt: skip
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    code = subprocess.run(command, check=False, env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    spent += after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    noted.write_text(json.dumps({"seconds": spent}))  # of an interrupted one too
    if code:
        raise SystemExit(f"lqf-adapt ended with {code}; its messages stand above")
    return spent


def probe(network: Backbone, train: Split, test: Split) -> float:
    """Test accuracy of ridge regression on the features."""
    (x, y), (x_test, y_test) = ((features(network, images), target) for images, target in (train, test))
    classes, kept = int(y.max()) + 1, torch.randperm(len(y), generator=torch.Generator().manual_seed(0))
    fit, judge = kept[len(y) // 5 :], kept[: len(y) // 5]
    accuracy = [correct(*solution, x[judge], y[judge]) for solution in solve(x[fit], y[fit], classes, RIDGES)]
    best = RIDGES[max(range(len(RIDGES)), key=accuracy.__getitem__)]
    return correct(*solve(x, y, classes, (best,))[0], x_test, y_test)


def solve(x: Tensor, y: Tensor, classes: int, ridges: tuple[float, ...]) -> list[tuple[Tensor, Tensor]]:
    """Weights and intercepts for each ridge."""
    ridge = RidgeProbe(x.shape[1], classes)
    ridge.update(x, y)
    return list(zip(*ridge.solve(ridges), strict=True))


def correct(weight: Tensor, bias: Tensor, x: Tensor, y: Tensor) -> float:
    """Share of right answers."""
    return ((x.double() @ weight.T + bias).argmax(1) == y).double().mean().item()


@torch.no_grad()
def features(network: Backbone, images: Tensor) -> Tensor:
    """Penultimate features, a few images at a time."""
    return torch.cat([penultimate_features(network, part) for part in images.split(64)])


def networks(slope: float, weights: Path) -> dict[str, Backbone]:
    """The three networks that are compared."""
    return {
        "original": create_backbone(NETWORK, 2, library="timm", weights="package"),
        "swapped": create_backbone(NETWORK, 2, library="timm", weights="package", leaky_slope=slope),
        "adapted": create_backbone(NETWORK, 2, library="timm", weights=weights, leaky_slope=slope),
    }


def load(folder: Path, size: int, network: Backbone, most: int | None) -> dict[str, Split]:
    """Training and test images of one folder, all of them or the first of a random order."""
    counts = {split: sum(1 for _ in (folder / split).glob("*/*")) for split in ("train", "test")}
    return {
        split: load_folder(folder / split, min(count, most or count), size, network.mean, network.std)
        for split, count in counts.items()
    }


def claims(probes: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    return [
        {
            "claim": f"{name}: accuracy of the probe that adapting wins back, as a share of what the swap cost",
            "value": (found["adapted"] - found["swapped"]) / (found["original"] - found["swapped"]),
            "target": 0.5, "holds": found["adapted"] >= (found["original"] + found["swapped"]) / 2,
        }
        for name, found in probes.items() if found["original"] > found["swapped"]
    ]  # fmt: skip


def main() -> None:
    """Adapt, probe and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="of lqf-adapt, such as method.anneal=0")
    parser.add_argument("--quick", action="store_true", help="a smoke run: few images of 32 pixels, one epoch")
    parser.add_argument("--folder", action="append", required=True, help="NAME=PATH")
    parser.add_argument("--probe", action="append", default=[], help="folders to probe on; without: all")
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--slope", type=float, default=0.1)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--work", type=Path, default=Path("runs/adapt_benchmark"))
    parser.add_argument("--weights", type=Path, help="where the adapted file goes; without: into the work folder")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.quick:
        options.size, options.epochs, options.work = 32, 1, options.work / "quick"
    options.work = options.work.absolute()
    options.work.mkdir(parents=True, exist_ok=True)
    folders = {name: Path(path) for name, _, path in (entry.partition("=") for entry in options.folder)}
    weights = options.weights or options.work / "leaky.safetensors"
    seconds = adapt(options, pool(folders, options.work, 10 if options.quick else None), weights, options.epochs)
    compared, most = networks(options.slope, weights), 80 if options.quick else None
    probes: dict[str, dict[str, float]] = {}
    for name in options.probe or folders:
        data = load(folders[name], options.size, compared["original"], most)
        probes[name] = {key: probe(network, data["train"], data["test"]) for key, network in compared.items()}
        print(name, json.dumps(probes[name]), flush=True)
    with safe_open(weights, "pt") as file:
        told = file.metadata()
    report = {
        "benchmark": "adapt", "quick": options.quick, "network": NETWORK, "size": options.size, "slope": options.slope,
        "epochs": options.epochs, "overrides": options.overrides, "images": json.loads(told["images"]),
        "steps": json.loads(told["steps"]), "cpu_seconds": seconds, "errors": json.loads(told["errors"]),
        "probe": probes, "claims": [] if options.quick else claims(probes),
    }  # fmt: skip
    write_report(report, options.output)


if __name__ == "__main__":
    main()
