"""The measured parts of `summarize.py`: the problem, what is removed in which order, and the accuracy that is left."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from images_from_folder import load_folder
from torch import Tensor

from lqf_lightning.backbones import create_backbone
from lqf_lightning.information.summarize import Judged, summarize
from lqf_lightning.linear import (
    DualFactor,
    Kernel,
    KernelSpectrum,
    LinearizedModel,
    QuadraticProblem,
    StreamedJacobian,
    assemble_kernel,
    regularization_path,
)
from lqf_lightning.linear.restrict import restrict_kernel, restrict_problem

ALPHA, CLASSES, CHUNK = 15.0, 10, 32
STEP = 0.05  # share of what remains that an iteration removes


def build(data: Path, name: str, size: Mapping[str, Any]) -> dict[str, Tensor]:
    """Exact kernels among training images and with those that are watched and tested, all layers linearized."""
    torch.manual_seed(0)
    side, counts = size["side"], [size["train"], size["watched"], size["test"]]
    backbone = create_backbone("tf_efficientnet_lite0", CLASSES, weights="package", image_size=side)
    if name == "digits":
        images, labels = load_digits(sum(counts), side, backbone.mean, backbone.std)
    else:
        images, labels = load_folder(data / name / "train", sum(counts), side, backbone.mean, backbone.std)
    train, others = images[: counts[0]].split(CHUNK), images[counts[0] :].split(CHUNK)
    model = LinearizedModel(backbone.model, example=images[:2])
    names = [name for name in model.deltas if name != f"{backbone.head}.bias"]
    pair = assemble_kernel(model, {"all": names}, train, others)
    if pair.cross is None:
        raise RuntimeError("there were no images to test on")
    initial = torch.cat([StreamedJacobian(model, part).initial() for part in (train, others)])
    kernels = {"kernel": pair.train.total().float(), "cross": pair.cross.total().float()}
    return {**kernels, "initial": initial, "label": labels}


def load_digits(count: int, side: int, mean: tuple[float, ...], std: tuple[float, ...]) -> tuple[Tensor, Tensor]:
    """Handwritten digits of scikit-learn, enlarged, in random order."""
    from sklearn.datasets import load_digits as load

    digits = load()
    order = torch.randperm(len(digits.target), generator=torch.Generator().manual_seed(0))[:count]
    images = torch.from_numpy(digits.images)[order].float().unsqueeze(1) / 16
    images = F.interpolate(images, (side, side), mode="bicubic").clamp(0, 1).expand(-1, 3, -1, -1)
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return images, torch.from_numpy(digits.target)[order]


class Case:
    """A set with its kernels; subsets of the training images are given by their positions."""

    def __init__(self, stored: Mapping[str, Tensor], size: Mapping[str, Any]) -> None:
        self.train, self.watched = size["train"], size["watched"]
        self.kernel, self.cross = stored["kernel"], stored["cross"]
        self.initial, self.label = stored["initial"], stored["label"]

    def problem(self, ridge: float) -> QuadraticProblem:
        """The problem of all training images."""
        kept = slice(self.train)
        target = ALPHA * F.one_hot(self.label[kept], CLASSES).double()
        return QuadraticProblem(self.initial[kept], target, ridge, intercept=True)

    @property
    def among(self) -> Kernel:
        """Inner products among the training images."""
        return Kernel({"all": self.kernel}, CLASSES)

    def choose_ridge(self) -> float:
        """The ridge with the best leave-one-out accuracy on all training images."""
        return float(regularization_path(KernelSpectrum(self.problem(1.0), self.among)).choose(by="accuracy"))

    def order(self, ridge: float, kind: Literal["iterative", "one_shot"], least: int) -> list[int]:
        """Positions of the training images, the first to leave first, by information in watched outputs."""
        watched = slice(self.train, self.train + self.watched)
        target = F.one_hot(self.label[watched], CLASSES).double()  # decides nothing here
        cross = Kernel({"all": self.cross[:, : self.watched * CLASSES]}, CLASSES)
        judged = Judged(cross, self.initial[watched], target)
        share = STEP if kind == "iterative" else 0.9  # what is scored once needs no rounds
        found = summarize(self.problem(ridge), self.among, judged, order=kind, share=share, least=least)
        return found.order.tolist()

    def accuracy(self, kept: Tensor, ridge: float) -> float:
        """Share of right answers on the test images after training on a subset to the optimum."""
        tested = self.train + self.watched
        cross = Kernel({"all": self.cross[:, self.watched * CLASSES :]}, CLASSES)
        factor = DualFactor(
            restrict_problem(self.problem(ridge), kept), restrict_kernel(self.among, rows=kept, columns=kept)
        )
        outputs = factor.predict(restrict_kernel(cross, columns=kept), self.initial[tested:])
        return float((outputs.argmax(1) == self.label[tested:]).double().mean())


def follow(case: Case, ridge: float, order: list[int], shares: list[float]) -> list[dict[str, Any]]:
    """Remove shares of the training images in an order, and train on the rest."""
    result = []
    for share in shares:
        kept = torch.tensor(order[round(share * case.train) :]).sort().values
        counts = torch.bincount(case.label[kept], minlength=CLASSES).tolist()
        result.append({"share": share, "accuracy": case.accuracy(kept, ridge), "per_class": counts})
    return result


def by_lot(number: int, seed: int) -> list[int]:
    """A random order."""
    order: list[int] = torch.randperm(number, generator=torch.Generator().manual_seed(seed)).tolist()
    return order
