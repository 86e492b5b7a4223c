"""What `label_errors.py` measures of the project itself: the images, and every detector's score of every sample."""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from images_from_folder import load_folder
from step_cost import clock
from torch import Tensor, nn

from lqf_lightning.backbones import Backbone, create_backbone
from lqf_lightning.backbones.features import penultimate_features
from lqf_lightning.data.digits_source import DigitsSource
from lqf_lightning.data.label_noise import flip_labels
from lqf_lightning.information import function_information, label_suspects, weight_information
from lqf_lightning.information.learning_speed import LearningHistory
from lqf_lightning.information.sample_outcomes import sample_outcomes
from lqf_lightning.linear import (
    DualFactor,
    Kernel,
    KernelPair,
    KernelSpectrum,
    LinearizedModel,
    QuadraticProblem,
    assemble_kernel,
    leave_one_out,
    regularization_path,
)  # fmt: skip

ALPHA, CHUNK, BATCH, RATE, DECAY = 15.0, 32, 32, 1e-3, 0.01
FORMS: dict[str, dict[str, Any]] = {"trace_2": {"form": "trace", "combinations": 2}, "exact": {"form": "full"}}
Part = dict[str, Any]  # {"seconds": end to end, "scores": {name: [n]}, ...}


class Case:
    """A set of images, a tenth of whose labels are wrong, and the network with its ImageNet weights.

    Args:
        data: Holds NAME/train/CLASS/* and NAME/test/CLASS/*; digits come with scikit-learn.
        name: The set.
        size: `train`, `other` (images without labels), `side`, `epochs`.
        noise: Seed of the wrong labels.
        work: Where features and networks are kept between parts.
    """

    def __init__(self, data: Path, name: str, size: Mapping[str, int], noise: int, work: Path) -> None:
        self.size, self.work = size, work
        torch.manual_seed(0)
        architecture = "tf_efficientnet_lite0"
        probe = create_backbone(architecture, 2, weights="package", image_size=size["side"])
        load = load_digits if name == "digits" else load_split
        self.x, labels = load(data / name, "train", size["train"], size["side"], probe.mean, probe.std)
        self.x_other, _ = load(data / name, "test", size["other"], size["side"], probe.mean, probe.std)
        self.classes = int(labels.max()) + 1
        names = [str(row) for row in range(len(labels))]
        self.label = torch.from_numpy(flip_labels(names, labels.tolist(), self.classes, 0.1, noise))
        self.wrong = self.label != labels
        self.target = F.one_hot(self.label, self.classes).double()
        torch.manual_seed(0)
        self.backbone: Backbone = create_backbone(
            architecture, self.classes, weights="package", image_size=size["side"]
        )

    @property
    def network(self) -> nn.Module:
        """The network before training."""
        return self.backbone.model

    @cached_property
    def features(self) -> tuple[Tensor, Tensor, float]:
        """What the last layer sees of the training images and of the others, and the seconds for the former."""
        file = self.work / "features.pt"
        if not file.exists():
            start = clock("cpu")
            with torch.no_grad():
                own, other = ([penultimate_features(self.backbone, x) for x in part.split(CHUNK)] for part in self.both)
            share = len(self.x) / (len(self.x) + len(self.x_other))
            torch.save((torch.cat(own), torch.cat(other), (clock("cpu") - start) * share), file)
        own, other, seconds = torch.load(file)
        return own.double(), other.double(), seconds

    @property
    def both(self) -> tuple[Tensor, Tensor]:
        """Training images and others."""
        return self.x, self.x_other


def load_split(
    folder: Path, split: str, count: int, side: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """Images and labels of a folder, at most `count`."""
    there = sum(path.suffix.lower() in (".png", ".jpg", ".jpeg") for path in (folder / split).glob("*/*"))
    return load_folder(folder / split, min(count, there), side, mean, std)


def load_digits(
    folder: Path, split: str, count: int, side: int, mean: Sequence[float], std: Sequence[float]
) -> tuple[Tensor, Tensor]:
    """The digits of 8x8 pixels, enlarged."""
    samples = DigitsSource().load()[split]
    order = torch.randperm(len(samples.labels), generator=torch.Generator().manual_seed(0))[:count].tolist()
    pixels = np.stack([np.asarray(samples.images.read(row).convert("RGB")) for row in order])
    small = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    images = F.interpolate(small, size=(side, side), mode="bicubic")
    images = (images.clamp(0, 1) - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return images, torch.tensor([samples.labels[row] for row in order])


def last_layer(case: Case) -> Part:
    """Leave-one-out of a linear probe: the kernel of the features, on top of outputs of zero."""
    own, other, seconds = case.features
    start = clock("cpu")
    kernels = [Kernel({"head": (rows @ own.T)[None]}, case.classes, "last_layer") for rows in (own, other)]
    problem = QuadraticProblem(torch.zeros_like(case.target), case.target, 1.0, intercept=True)
    found = judge(case, problem, kernels[0], kernels[1])
    return {**found, "seconds": seconds + clock("cpu") - start}


def tangent_kernel(case: Case, name: str) -> Part:
    """Leave-one-out of all layers linearized, by a cheaper kernel or the exact one."""
    model = LinearizedModel(case.network, example=case.x[:2])
    bias = f"{case.backbone.head}.bias"  # the intercept stands for it
    groups = {g: own for g, names in case.backbone.groups.items() if (own := [n for n in names if n != bias])}
    start = clock("cpu")
    with torch.no_grad():
        initial = torch.cat([model(x) for x in case.x.split(CHUNK)])
    pair: KernelPair = assemble_kernel(model, groups, case.x.split(CHUNK), case.x_other.split(CHUNK), **FORMS[name])
    assembled = clock("cpu")
    problem = QuadraticProblem(initial, ALPHA * case.target, 1.0, intercept=True)
    found = judge(case, problem, pair.train, pair.cross)
    return {**found, "seconds": clock("cpu") - start, "assembly": assembled - start}


def judge(case: Case, problem: QuadraticProblem, kernel: Kernel, cross: Kernel | None) -> Part:
    """Scores at the ridge with the least squared leave-one-out error, which the labels as they are decide."""
    path = regularization_path(KernelSpectrum(problem, kernel))
    ridge = path.choose(by="press")
    result = leave_one_out(DualFactor(problem.with_(ridge=ridge), kernel), cross)
    if result.function_change is None:
        raise RuntimeError("there were no images without labels")
    suspects = label_suspects(result.prediction, case.label, result.residual)
    right = float((suspects.proposed == case.label).double().mean())
    scores = {
        "squared_residual": suspects.squared_residual, "margin": suspects.margin, "suspicion": suspects.suspicion,
        "function_information": function_information(result.function_change),
        "weight_information": weight_information(result.weight_change),
    }  # fmt: skip
    relative = ridge / float(kernel.total().diagonal(dim1=-2, dim2=-1).mean())
    values = {name: column.tolist() for name, column in scores.items()}
    return {"scores": values, "ridge": ridge, "relative_ridge": relative, "leave_one_out_accuracy": right}


def fine_tune(case: Case) -> Part:
    """Ordinary training of all layers, what every epoch said about every sample, and one last look at all of them."""
    torch.manual_seed(1)
    model = case.network.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=DECAY)
    steps = case.size["epochs"] * -(-len(case.x) // BATCH)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    history, start = LearningHistory(len(case.x)), clock("cpu")
    for epoch in range(case.size["epochs"]):
        logits = torch.empty(len(case.x), case.classes)
        for rows in torch.randperm(len(case.x)).split(BATCH):
            out = model(case.x[rows])
            loss = F.cross_entropy(out, case.label[rows])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            logits[rows] = out.detach()
        history.observe(epoch, sample_outcomes(logits, case.label))
    model.eval()
    trained = clock("cpu") - start
    with torch.no_grad():
        outcome = sample_outcomes(torch.cat([model(x) for x in case.x.split(CHUNK)]), case.label)
    seconds = clock("cpu") - start
    torch.save(model.state_dict(), case.work / "network.pt")
    seen = history.scores()
    scores = {
        "final_loss": outcome["loss"], "cumulative_correctness": -seen["cumulative_correctness"],
        "cumulative_confidence": -seen["cumulative_confidence"], "mean_loss": seen["mean_loss"],
    }  # fmt: skip
    return {
        "scores": {name: column.tolist() for name, column in scores.items()}, "seconds": seconds, "training": trained,
        "training_accuracy": float(outcome["correct"].mean()),
    }  # fmt: skip
