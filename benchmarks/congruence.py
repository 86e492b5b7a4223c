"""How many negative flips each way of updating a model leaves, on real images and weights.

Every model is a run of `lqf-train` in a process of its own, with one thread; every prediction is made by the model that
`reference=` opens, on images as that model evaluates them; weights are averaged by `lqf-compare`. Finished models are
kept in the work folder, so that an interrupted measurement goes on.

    python benchmarks/congruence.py --data DIR [--weights DIR] [--set cifar10 ...] [--quick | --full] [--work DIR]
        [--seeds N] [--until SECONDS] [--output FILE]

DIR holds one folder per set, each with train/CLASS/*.png and test/CLASS/*.png; the folder of weights holds
mobilenet_v2.pth and resnet50.pth with torchvision's keys. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import safetensors.torch
import timm
import torch
from congruence_figures import claims, figures
from congruence_plan import Model, Plan, linear, nonlinear

from lqf_lightning.data import FolderSource, ImageDataModule
from lqf_lightning.references import open_reference
from lqf_lightning.train import prepare_process

SIZES: dict[str, dict[str, dict[str, Any]]] = {
    "quick": {
        "cifar10": {"share": 0.02, "side": 32, "epochs": 1, "linear": 0.01},
        "cars50": {"share": 0.4, "side": 32, "epochs": 1, "linear": 0},
    },
    "default": {
        "cifar10": {"share": 0.4, "side": 48, "epochs": 4, "linear": 0.1},
        "cars50": {"share": 1.0, "side": 64, "epochs": 8, "linear": 0.3},
    },
    "full": {
        "cifar10": {"share": 1.0, "side": 224, "epochs": 10, "linear": 0.4},
        "cars50": {"share": 1.0, "side": 224, "epochs": 30, "linear": 0.3},
    },
}  # shares are those of the training images, a tenth of which is held out; CIFAR-10 has 5,000 of them
SGD_EPOCHS = 10  # of linearized networks
AVERAGES = (
    "averages=[bcwi,fisher]",
    "shares=[0,0.2,0.4,0.6,0.8,1]",
    "max_error_increase=0.005",
    "batch_norm_samples=1000",
)


class Workshop:
    """Trains the models of one set, and keeps them with their test predictions.

    Args:
        data: Folder of the set.
        size: Entry of `SIZES`.
        work: Folder that keeps everything.
        deadline: Moment after which no further model is begun.
    """

    def __init__(self, data: Path, size: dict[str, Any], work: Path, deadline: float) -> None:
        self.data, self.size, self.work, self.deadline = data, size, work, deadline
        self._module: ImageDataModule | None = None

    def common(self) -> list[str]:
        """Overrides of all runs of the set."""
        return [
            "data=folder", f"data.source.root={self.data}", f"data.image_size={self.size['side']}",
            "data.crop_fraction=1.0", "data/augmentation=shift", "data.batch_size=64", "data.eval_batch_size=256",
            "data.num_workers=0", "test=false", "logger=[]", "callbacks=[]", "progress=none",
        ]  # fmt: skip

    def checkpoint(self, name: str) -> Path:
        """The checkpoint of a finished model: of exact solvers the last, of others the best."""
        folder = self.work / name / "checkpoints"
        return folder / ("last.ckpt" if "_exact" in name or "linear_half" in name else "best.ckpt")

    def train(self, model: Model) -> None:
        """Train a model, unless it is there."""
        if (self.work / name_of_logits(model.name)).exists():
            return
        if time.monotonic() > self.deadline:
            raise TimeoutError(f"out of time before {model.name}")
        epochs = (
            [] if any("max_epochs" in o for o in model.overrides) else [f"trainer.max_epochs={self.size['epochs']}"]
        )
        overrides = [o.format_map(Places(self)) if "{" in o else o for o in model.overrides]
        reference = ",".join(str(self.checkpoint(name)) for name in model.reference)
        learned = [f"reference=[{reference}]"] if model.reference else []
        command = [sys.executable, "-m", "lqf_lightning.train", *self.common(), *epochs, *overrides, *learned]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([*command, f"hydra.run.dir={self.work / model.name}"], check=True, stdout=sys.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        logits = {"logits": self.predict(model.name), "seconds": torch.tensor(seconds)}
        safetensors.torch.save_file(logits, self.work / name_of_logits(model.name))
        print(f"{model.name}: {seconds:.0f} s", file=sys.stderr, flush=True)

    def module(self) -> ImageDataModule:
        """The images of the set."""
        if self._module is None:
            self._module = ImageDataModule(
                FolderSource(self.data), image_size=self.size["side"], crop_fraction=1.0, num_workers=0, batch_size=256
            )
            self._module.setup()
        return self._module

    def predict(self, name: str) -> torch.Tensor:
        """Test outputs of a model on its own images."""
        model = open_reference(str(self.checkpoint(name)))
        loader = self.module().view_dataloader("test", model.view)
        return torch.cat([model(batch.input) for batch in loader])

    def target(self) -> torch.Tensor:
        """Test labels."""
        return torch.from_numpy(self.module().manifest.rows("test")["label"].to_numpy().copy())

    def outputs(self, members: tuple[str, ...]) -> torch.Tensor | None:
        """Mean test outputs of an ensemble; None while a member is missing."""
        files = [self.work / name_of_logits(name) for name in members]
        if not all(file.exists() for file in files):
            return None
        return torch.stack([safetensors.torch.load_file(file)["logits"] for file in files]).mean(0)

    def seconds(self, name: str) -> float:
        """Processor time of a training."""
        return float(safetensors.torch.load_file(self.work / name_of_logits(name))["seconds"])

    def has_average(self, old: str, new: str) -> bool:
        """Whether `average` needs no computing."""
        return (self.work / f"average_{old}_{new}" / "report.json").exists()

    def average(self, old: str, new: str) -> dict[str, Any]:
        """The report of `lqf-compare`, weight averages included."""
        folder = self.work / f"average_{old}_{new}"
        if not self.has_average(old, new):
            if time.monotonic() > self.deadline:
                raise TimeoutError(f"out of time before {folder.name}")
            arguments = [f"old={self.checkpoint(old)}", f"new={self.checkpoint(new)}", f"hydra.run.dir={folder}"]
            command = [sys.executable, "-m", "lqf_lightning.compare", *arguments, *AVERAGES]
            subprocess.run(command, check=True, stdout=sys.stderr)
        return dict(json.loads((folder / "report.json").read_text()))


class Places(dict[str, str]):
    """Replaces {model} in an override by its checkpoint."""

    def __init__(self, workshop: Workshop) -> None:
        super().__init__()
        self.workshop = workshop

    def __missing__(self, name: str) -> str:
        """The checkpoint of a model."""
        return str(self.workshop.checkpoint(name))


def name_of_logits(name: str) -> str:
    """The file of a model's test outputs."""
    return f"{name}.safetensors"


def run(plan: Plan, workshop: Workshop) -> bool:
    """Train what is missing, as long as there is time; whether everything is there."""
    try:
        averaged = {pair[1]: pair for update in plan.updates for pair in update.averaged}
        for model in plan.models.values():
            workshop.train(model)
            if model.name in averaged:
                workshop.average(*averaged[model.name])
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return False
    return True


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--weights", type=Path)
    parser.add_argument("--set", action="append", choices=list(SIZES["default"]))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--until", type=float, default=float("inf"), help="begin no model after so many seconds")
    parser.add_argument("--work", type=Path, default=Path("congruence_work"))
    parser.add_argument("--output", type=Path)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_const", dest="size", const="quick", default="default")
    which.add_argument("--full", action="store_const", dest="size", const="full")
    arguments = parser.parse_args()
    prepare_process()
    torch.set_num_threads(1)
    seeds = 1 if arguments.size == "quick" else arguments.seeds
    report: dict[str, Any] = {
        "benchmark": "congruence", "size": arguments.size, "sets": {}, "claims": [], "seeds": seeds,
        "versions": {"torch": torch.__version__, "timm": timm.__version__}, "machine": platform.platform(),
        "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    deadline = time.monotonic() + arguments.until
    for name in arguments.set or ["cifar10"]:
        size = SIZES[arguments.size][name]
        workshop = Workshop(arguments.data.absolute() / name, size, arguments.work.absolute() / name, deadline)
        workshop.work.mkdir(parents=True, exist_ok=True)
        weights = arguments.weights.absolute() if arguments.weights else None
        plans = [
            nonlinear(size["share"], seeds, weights, arguments.size != "quick"),
        ]
        if size["linear"]:
            plans.insert(0, linear(size["linear"], seeds, SGD_EPOCHS if arguments.size != "quick" else 1))
        done = [run(plan, workshop) for plan in plans]
        report["sets"][name] = {**size, "complete": all(done), "updates": figures(plans, workshop)}
        report["claims"] += claims(name, report["sets"][name])
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
