"""How well the expansion of a pre-trained network foretells what training without a sample would change.

EfficientNet-Lite0 with its ImageNet weights and a random head is trained by full-batch gradient descent on a squared
loss with one-hot targets, batch normalization frozen and all weights free, on dtd10 and on CIFAR-10 (10 classes each),
and again without each of some samples drawn by lot. What the missing sample changes, |w - w_-i|^2 and the mean of
|f - f_-i|^2 over other images, is compared with the prediction for the same number of steps from the tangent kernel at
the pre-trained weights, once for the linearized network, whose training it describes exactly, and once for ordinary
fine-tuning; without a penalty (a ridge of 1e-9 of the kernel's largest eigenvalue) and with one of 0.1 of it towards
the pre-trained weights. The head starts with a deviation of 0.005, so that the first outputs are smaller than the
targets; with the package's 0.02 they are several times larger, the weights move further, and fine-tuning is repeated
without a penalty to see what that costs. Harutyunyan et al. (arXiv 2101.06640, table 1) report correlations of .87
to .97 for weights and .875 to .895 for predictions of pre-trained networks. Finished trainings are kept in the work
folder.

    python benchmarks/unique_information.py --data DIR [--quick] [--work DIR] [--output FILE]

DIR holds dtd10/train/CLASS/*.png and cifar10/train/CLASS/*.png. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import timm
import torch
from step_cost import cpu_name
from torch import Tensor
from unique_information_parts import PENALTIES, Case, compare, predict, retrain

SIZES: dict[str, dict[str, Any]] = {
    "quick": {
        "train": 12, "val": 6, "sides": {"cifar10": 32}, "steps": 3, "step_share": 0.25,
        "removals": {"finetune": 3, "lqf": 3},
    },
    "default": {
        "train": 60, "val": 60, "sides": {"cifar10": 64, "dtd10": 64}, "steps": 40, "step_share": 0.25,
        "removals": {"finetune": 20, "lqf": 3},
    },
}  # fmt: skip
PAPER = 0.87
SMALL, USUAL = 0.005, 0.02  # deviations of the head's first weights
QUANTITIES = {"weights": "|w - w_-i|^2", "predictions": "|f - f_-i|^2"}


class Work:
    """One set with one start of the head; runs what is not yet in the work folder."""

    def __init__(self, data: Path, size: Mapping[str, Any], folder: Path, name: str, head_std: float) -> None:
        self.data, self.size, self.name, self.head_std = data, size, name, head_std
        self.prefix = f"{folder}/{name}_head{head_std}"

    @cached_property
    def case(self) -> Case:
        """Images and network."""
        side, train, val = self.size["sides"][self.name], self.size["train"], self.size["val"]
        return Case(self.data / self.name / "train", train, val, side, self.head_std)

    @cached_property
    def predicted(self) -> dict[str, Any]:
        """What the expansion says."""
        file = Path(f"{self.prefix}_predicted.json")
        if not file.exists():
            file.write_text(json.dumps(predict(self.case, self.size)))
        found: dict[str, Any] = json.loads(file.read_text())
        return found

    def trained(self, kind: str, penalty: str) -> dict[str, Any]:
        """Training on all samples."""
        file = Path(f"{self.prefix}_{kind}_{penalty}.pt")
        if not file.exists():
            torch.save(retrain(self.case, kind, self.predicted[penalty]), file)
        found: dict[str, Any] = torch.load(file, weights_only=True)
        return found

    def setting(self, kind: str, penalty: str) -> dict[str, Any]:
        """Predicted and true changes of the samples drawn by lot."""
        plan, changes = self.predicted[penalty], []
        lot = torch.randperm(self.size["train"], generator=torch.Generator().manual_seed(0)).tolist()
        full = self.trained(kind, penalty)
        for sample in lot[: self.size["removals"][kind]]:
            file = Path(f"{self.prefix}_{kind}_{penalty}_without_{sample}.json")
            if not file.exists():
                file.write_text(json.dumps(compare(full, retrain(self.case, kind, plan, sample))))
            changes.append({"sample": sample, **json.loads(file.read_text())})
            print(file.stem, json.dumps(changes[-1]), flush=True)
        return judge(plan, full, changes)

    def figures(self, settings: list[tuple[str, str]]) -> dict[str, Any]:
        """Several settings, and what they have in common."""
        kept = ("ridge", "step", "steps", "learning_rate_of_the_mean_loss", "seconds")
        found: dict[str, Any] = {name: self.predicted[name] for name in ("top", "share_of_head", "assembly_seconds")}
        found["plan"] = {penalty: {key: self.predicted[penalty][key] for key in kept} for penalty in PENALTIES}
        for kind, penalty in settings:
            found.setdefault(kind, {})[penalty] = self.setting(kind, penalty)
        return found


def judge(plan: Mapping[str, Any], full: Mapping[str, Any], changes: list[dict[str, Any]]) -> dict[str, Any]:
    """Correlation and relative errors of the prediction."""
    samples = [change["sample"] for change in changes]
    figures: dict[str, Any] = {key: full[key] for key in ("loss_before", "loss_after", "accuracy_after", "seconds")}
    figures["samples"] = samples
    for quantity in QUANTITIES:
        predicted = torch.tensor([plan[quantity][sample] for sample in samples], dtype=torch.float64)
        found = torch.tensor([change[quantity] for change in changes], dtype=torch.float64)
        errors = (predicted - found).abs() / found
        figures[quantity] = {
            "pearson": correlation(predicted, found), "spearman": correlation(ranks(predicted), ranks(found)),
            "pearson_of_logarithms": correlation(predicted.log(), found.log()),
            "largest_relative_error": float(errors.max()), "median_relative_error": float(errors.median()),
            "predicted": predicted.tolist(), "found": found.tolist(),
        }  # fmt: skip
    return figures


def correlation(one: Tensor, other: Tensor) -> float:
    """Pearson's."""
    return float(torch.corrcoef(torch.stack([one, other]))[0, 1])


def ranks(values: Tensor) -> Tensor:
    """Position in ascending order."""
    return values.argsort().argsort().double()


def claims(figures: Mapping[str, Any], size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    result = []
    for name, side in size["sides"].items():
        where = f"{name}, n = {size['train']}, {side} px, {size['steps']} steps"
        small, usual = figures[name]["small_head"], figures[name]["usual_head"]["finetune"]["none"]
        for penalty in PENALTIES:
            here, tuned, exact = f"{where}, {_spoken(penalty)}", small["finetune"][penalty], small["lqf"][penalty]
            for quantity, formula in QUANTITIES.items():
                found, error = tuned[quantity]["pearson"], exact[quantity]["largest_relative_error"]
                result.append(_claim(f"{here}: fine-tuning, Pearson of {formula}", found, PAPER, least=True))
                result.append(_claim(f"{here}: LQF, largest relative error of {formula}", error, 1e-2))
            share = tuned["loss_after"] / tuned["loss_before"]
            result.append(_claim(f"{here}: fine-tuning, training loss after over before", share, 0.5))
        for quantity, formula in QUANTITIES.items():
            text = f"{where}, {_spoken('none')}, head started at {USUAL}: fine-tuning, Pearson of {formula}"
            result.append(_claim(text, usual[quantity]["pearson"], PAPER, least=True))
    return result


def _spoken(penalty: str) -> str:
    return {"none": "no penalty", "penalty": "with penalty"}[penalty]


def _claim(text: str, value: float, target: float, least: bool = False) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": value >= target if least else value <= target}


def run(data: Path, size: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """All settings, what is kept from before included."""
    everything = [(kind, penalty) for kind in ("finetune", "lqf") for penalty in PENALTIES]
    figures: dict[str, Any] = {name: {} for name in size["sides"]}
    for title, head_std, settings in (("small_head", SMALL, everything), ("usual_head", USUAL, [("finetune", "none")])):
        for name in size["sides"]:
            figures[name][title] = Work(data, size, folder, name, head_std).figures(settings)
    return figures


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dtd10/train and cifar10/train")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--work", type=Path, default=Path("runs/unique_information"), help="where parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "quick" if options.quick else "default"
    size, folder = SIZES[name], options.work / name
    folder.mkdir(parents=True, exist_ok=True)
    figures = run(options.data, size, folder)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = json.dumps({
        "benchmark": "unique_information", "size": name, "sizes": size, "figures": figures,
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
