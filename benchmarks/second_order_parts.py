"""Images and the linear classifier of `second_order.py`."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import sklearn.datasets
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from lqf_lightning.linear import RidgeProbe

RIDGES = [10 ** (power / 2) for power in range(-8, 5)]
FOLDS = 5


@dataclass(frozen=True)
class Images:
    """8-bit images (n, 3, H, W) and class positions (n,) to fit and to judge by."""

    train: Tensor
    train_target: Tensor
    test: Tensor
    test_target: Tensor
    classes: int


def digits(count: int) -> Images:
    """Scikit-learn's handwritten digits: `count` to fit, as many others to judge by."""
    bunch = sklearn.datasets.load_digits()
    order = torch.randperm(len(bunch.images), generator=torch.Generator().manual_seed(0))[: 2 * count]
    gray = torch.from_numpy(bunch.images)[order].float() * (255 / 16)
    large = F.interpolate(gray.unsqueeze(1).repeat(1, 3, 1, 1), size=(64, 64), mode="bilinear").to(torch.uint8)
    target = torch.from_numpy(bunch.target)[order]
    return Images(large[:count], target[:count], large[count:], target[count:], 10)


def class_folders(root: Path, count: int) -> Images:
    """The first `count` classes of `root/train` and `root/test`, whose images must have one size."""
    names = sorted(path.name for path in (root / "train").iterdir() if path.is_dir())[:count]
    parts = [_read(root / part, names) for part in ("train", "test")]
    return Images(*parts[0], *parts[1], len(names))


def _read(folder: Path, names: list[str]) -> tuple[Tensor, Tensor]:
    files = [(file, at) for at, name in enumerate(names) for file in sorted((folder / name).iterdir())]
    pixels = np.stack([np.asarray(Image.open(file).convert("RGB")) for file, _ in files])
    return torch.from_numpy(pixels).permute(0, 3, 1, 2), torch.tensor([at for _, at in files])


def score_probe(train: Tensor, target: Tensor, test: Tensor, test_target: Tensor, classes: int) -> dict[str, float]:
    """Accuracy of a ridge probe whose ridge five folds of the training images have chosen.

    The probe is fitted in an orthonormal basis of the span of the centered training features, in which it is the same
    and as large as there are images, however many features there are.
    """
    mean = train.double().mean(0)
    _, values, basis = torch.linalg.svd(train.double() - mean, full_matrices=False)
    basis = basis[values > 1e-9 * values[0]]
    inside, outside = (train.double() - mean) @ basis.T, (test.double() - mean) @ basis.T
    fold = torch.randperm(len(train), generator=torch.Generator().manual_seed(0)) % FOLDS
    right = torch.stack([
        _right(inside[fold != k], target[fold != k], inside[fold == k], target[fold == k], classes, RIDGES)
        for k in range(FOLDS)
    ]).sum(0)
    best = int(right.argmax())
    hits = _right(inside, target, outside, test_target, classes, [RIDGES[best]])
    return {
        "test_acc": hits.item() / len(test), "cross_validated_acc": right[best].item() / len(train),
        "ridge": RIDGES[best],
    }  # fmt: skip


def _right(
    train: Tensor, target: Tensor, other: Tensor, other_target: Tensor, classes: int, ridges: list[float]
) -> Tensor:
    probe = RidgeProbe(train.shape[1], classes)
    probe.update(train, target)
    weight, bias = probe.solve(ridges)
    scores = torch.einsum("nf,rcf->rnc", other, weight) + bias[:, None]
    return (scores.argmax(-1) == other_target).sum(1)
