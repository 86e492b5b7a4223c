"""What user weights around a frozen core are worth, and what is left when all or some of their data are forgotten.

EfficientNet-Lite0 with its ImageNet weights and a random head on CIFAR-10 images, half of which are core data that will
never have to be forgotten, half user data: either by class (the first five, the last five), or half of every class.
The core is trained by stochastic gradient descent on the cross-entropy of the core images. The user weights are the
optimum of its linear model on the user images, from their kernel, with the ridge of the best leave-one-out accuracy
on them, of those that single precision resolves. Accuracy is that on the test images: of the core, with the user
weights, after forgetting all (weights zeroed), and after forgetting 10 % of them by a scrub, which has the kernel,
and by training again with a kernel of its own. Time is that of the process with one thread.

    python benchmarks/mixed_privacy.py --data DIR [--quick] [--work DIR] [--output FILE]

DIR holds train/CLASS and test/CLASS. Finished parts are kept in the work folder. The last line printed is one JSON
object.
"""

import argparse
import copy
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from forget_parts import ALPHA, CHUNK, Case, automatic_mu, kept_kernel, kept_solution, solve_with_kernel
from images_from_folder import load_folder
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from written_report import write_report

from lqf_lightning.backbones import create_backbone
from lqf_lightning.linear import LinearizedModel, StreamedJacobian
from lqf_lightning.methods.core_hash import core_hash

Tensors = dict[str, Tensor]
SPLITS, SHARE = ("classes", "halves"), 0.1
RESOLVED = 1e-5  # ridge over the largest eigenvalue that a kernel in single precision resolves
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"train": 80, "test": 40, "side": 32, "epochs": 2},
    "default": {"train": 1000, "test": 1000, "side": 32, "epochs": 10},
}
OPTIONS = {"alpha": ALPHA, "lr": 0.01, "momentum": 0.9, "weight_decay": 5e-4, "batch": 32}


class SplitCase(Case):
    """Images, who of them is core, the trained core and its linear model."""

    def __init__(self, data: Path, size: Mapping[str, Any], split: str, file: Path) -> None:
        torch.manual_seed(0)
        network = create_backbone("tf_efficientnet_lite0", 10, weights="package", image_size=size["side"])
        norm = (network.mean, network.std)
        self.x, self.y = load_folder(data / "train", size["train"], size["side"], *norm)
        self.x_test, self.y_test = load_folder(data / "test", size["test"], size["side"], *norm)
        core = self.y < 5 if split == "classes" else _half_of_every_class(self.y)
        self.core, self.user = core.nonzero().flatten(), (~core).nonzero().flatten()
        self.seconds = _trained(network.model, self.x[self.core], self.y[self.core], size["epochs"], file)
        self.plain = [network.model.eval()(part).detach() for part in self.x_test.split(CHUNK)]
        self.model = LinearizedModel(network.model, example=self.x[:2])
        self.hash = core_hash(self.model.model.state_dict())
        self.samples, self.classes = len(self.x), 10
        self.initial = StreamedJacobian(self.model, self.x.split(CHUNK)).initial()
        self.at_zero = self.test_outputs()

    def of_user(self) -> "SplitCase":
        """The same network with the user images alone."""
        own = copy.copy(self)
        own.x, own.y, own.initial = self.x[self.user], self.y[self.user], self.initial[self.user]
        own.samples = len(own.x)
        return own

    def put(self, movement: Tensors | None) -> None:
        """Set the user weights; None zeroes them."""
        with torch.no_grad():
            for name, delta in self.model.deltas.items():
                delta.zero_() if movement is None else delta.copy_(movement[name])

    def test_outputs(self) -> Tensor:
        """Of the linear model on the test images, by its own forward pass."""
        with torch.no_grad():
            return torch.cat([self.model(part) for part in self.x_test.split(CHUNK)])

    def accuracies(self, outputs: Tensor) -> dict[str, float]:
        """On all test images, and on those of the first and of the last five classes."""
        right = (outputs.argmax(-1) == self.y_test).double()
        first = self.y_test < 5
        return {"all": float(right.mean()), "first": float(right[first].mean()), "last": float(right[~first].mean())}


def _half_of_every_class(labels: Tensor) -> Tensor:
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for label in labels.unique():
        own = (labels == label).nonzero().flatten()  # in an order that was drawn
        chosen[own[: len(own) // 2]] = True
    return chosen


def _trained(model: nn.Module, x: Tensor, y: Tensor, epochs: int, file: Path) -> float:
    if not file.exists():
        began, batch = time.process_time(), OPTIONS["batch"]
        steps = epochs * (len(x) // batch)
        rule = {name: OPTIONS[name] for name in ("lr", "momentum", "weight_decay")}
        optimizer = torch.optim.SGD(model.parameters(), **rule)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
        model.train()
        for _ in range(epochs):
            for part in torch.randperm(len(x))[: len(x) // batch * batch].split(batch):
                optimizer.zero_grad()
                F.cross_entropy(model(x[part]), y[part]).backward()
                optimizer.step()
                schedule.step()
        state = {name: value.contiguous() for name, value in model.state_dict().items()}
        save_file(state | {"seconds": torch.tensor(time.process_time() - began, dtype=torch.float64)}, file)
    stored = load_file(file)
    seconds = float(stored.pop("seconds"))
    model.load_state_dict(stored)
    return seconds


def measure(data: Path, size: Mapping[str, Any], split: str, work: Path) -> dict[str, Any]:
    """All figures of one split."""
    case = SplitCase(data, size, split, work / f"{split}_core.safetensors")
    own = case.of_user()
    kernel, assembly = kept_kernel(own, work / f"{split}_kernel.safetensors")
    everyone = torch.arange(own.samples)
    top = float(torch.linalg.eigvalsh(kernel.groups["all"][0].double())[-1])
    mu = max(automatic_mu(own, kernel, everyone), RESOLVED * top / own.samples)
    gone = torch.randperm(own.samples, generator=torch.Generator().manual_seed(0))[: round(SHARE * own.samples)]
    mask = torch.ones(own.samples, dtype=torch.bool).index_fill(0, gone, False)
    retained, cohort = everyone[mask], case.user[~mask]

    def train_again() -> dict[str, Any]:
        began = time.process_time()
        found = solve_with_kernel(own, own.kernel(retained), retained, mu, own=True)
        return {**found, "seconds": time.process_time() - began}

    user = kept_solution(work / f"{split}_user", lambda: solve_with_kernel(own, kernel, everyone, mu))
    scrubbed = kept_solution(work / f"{split}_scrubbed", lambda: solve_with_kernel(own, kernel, retained, mu))
    retrained = kept_solution(work / f"{split}_retrained", train_again)
    found: dict[str, Any] = {"core_seconds": case.seconds, "core_samples": len(case.core), "forgotten": len(cohort)}
    found |= {"mu": mu, "assembly_seconds": assembly, "user_samples": len(case.user)}
    found["core_only"] = case.accuracies(case.at_zero)
    for name, model in (("user", user), ("scrubbed", scrubbed), ("retrained", retrained)):
        case.put(model["movement"])
        found[name] = case.accuracies(case.test_outputs()) | {k: v for k, v in model.items() if k != "movement"}
        found[name]["on_forgotten"] = _accuracy(case.model, case.x[cohort], case.y[cohort])
        found[name]["norm"] = _distance(model["movement"], dict.fromkeys(model["movement"], torch.zeros(())))
    found["user_to_retrained"] = _distance(user["movement"], retrained["movement"])
    found["scrubbed_to_retrained"] = _distance(scrubbed["movement"], retrained["movement"])
    case.put(None)
    outputs, plain = case.test_outputs(), torch.cat(case.plain)
    found["forgotten_all"] = case.accuracies(outputs) | {
        "bitwise_core": torch.equal(outputs, case.at_zero),
        "to_plain_core": float((outputs - plain).norm() / plain.norm()),
        "core_unchanged": core_hash(case.model.model.state_dict()) == case.hash,
    }
    return found


def _accuracy(model: LinearizedModel, x: Tensor, y: Tensor) -> float:
    with torch.no_grad():
        return float((torch.cat([model(part) for part in x.split(CHUNK)]).argmax(-1) == y).double().mean())


def _distance(first: Tensors, second: Tensors) -> float:
    return sum(float((first[name].double() - second[name].double()).square().sum()) for name in first) ** 0.5


def claims(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    result = []
    for split, own in figures.items():
        everything, scrubbed, retrained = own["forgotten_all"], own["scrubbed"], own["retrained"]
        untouched = everything["bitwise_core"] and everything["core_unchanged"]
        bound = scrubbed["distance_bound"] + retrained["distance_bound"]
        gain, distance = own["user"]["all"] - own["core_only"]["all"], own["scrubbed_to_retrained"]
        values = (
            ("forgetting everything gives the core's outputs, bitwise (1: yes)", float(untouched), 1.0, True),
            ("and those of the plain core network, relative distance", everything["to_plain_core"], 1e-5, False),
            ("accuracy that the user weights add", gain, 0.1 if split == "classes" else 0.0, True),
            ("distance of scrubbed and retrained weights over its bound", distance / bound, 1.0, False),
            ("difference in accuracy of the two", abs(scrubbed["all"] - retrained["all"]), 0.01, False),
            ("accuracy on the forgotten images, against training again",
             abs(scrubbed["on_forgotten"] - retrained["on_forgotten"]), 0.02, False),
            ("seconds of training again over those of the scrub", retrained["seconds"] / scrubbed["seconds"], 10, True),
        )  # fmt: skip
        for text, value, target, least in values:
            holds = value >= target if least else value <= target
            result.append({"claim": f"{split}: {text}", "value": value, "target": target, "holds": holds})
    return result


def main() -> None:
    """Run both splits and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with train/CLASS and test/CLASS of CIFAR-10")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--work", type=Path, default=Path("runs/mixed_privacy"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "quick" if options.quick else "default"
    size, work = SIZES[name], options.work / name
    work.mkdir(parents=True, exist_ok=True)
    figures = {split: measure(options.data, size, split, work) for split in SPLITS}
    report = {
        "benchmark": "mixed_privacy", "size": name, "sizes": size, "options": OPTIONS, "figures": figures,
        "claims": [] if options.quick else claims(figures),
    }  # fmt: skip
    write_report(report, options.output)


if __name__ == "__main__":
    main()
