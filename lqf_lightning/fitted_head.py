"""A head to start from that is fitted to data which will not have to be forgotten, or judged by: `head=core`."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import pandas as pd
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.functional import one_hot
from torch.utils.data import DataLoader

from lqf_lightning.backbones import Backbone, penultimate_features
from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.data import Batch, ImageDataModule
from lqf_lightning.linear import (
    QuadraticProblem,
    current_reducer,
    held_out_accuracy,
    held_out_cross_entropy,
    held_out_press,
    leave_one_out,
)
from lqf_lightning.linear.features import Features
from lqf_lightning.linear.primal import PrimalFactor
from lqf_lightning.progress import track

FILE = "fitted_head.safetensors"  # in the run folder
RIDGES = tuple(10.0**power for power in range(-6, 2))  # relative to the mean variance of the features
_STEEPEST = 15.0  # logit of the right class where predictions are so good that no temperature is too low


@dataclass(frozen=True)
class FittedHead:
    """A ridge probe on fixed features, which answers 1 for the right class and 0 for the others.

    Attributes:
        weight: Weights (C, F), float32.
        bias: Intercepts (C,), float32; zeros where the network's head has none.
        classes: Class names, in the order of the outputs.
        contents: Hashes of the images that it was fitted to.
        ridge: Of the probe, relative to the mean variance of the features.
        accuracy: Of leave-one-out predictions on these images.
        steepness: What its answers are multiplied with to be logits: the inverse temperature that suits leave-one-out
            predictions best, at most 15.
    """

    weight: Tensor
    bias: Tensor
    classes: tuple[str, ...]
    contents: frozenset[str]
    ridge: float
    accuracy: float
    steepness: float

    @torch.no_grad()
    def put_into(self, backbone: Backbone, scale: float | None, classes: Sequence[str] | None = None) -> None:
        """Make it the last layer of a network.

        Args:
            backbone: The network, changed in place.
            scale: Value of the right class; None: as logits.
            classes: The same classes in the order that the network's outputs are to have; None: as they are.

        Raises:
            ValueError: The network has other features.
        """
        layer, factor = backbone.model.get_submodule(backbone.head), self.steepness if scale is None else scale
        weight = layer.get_parameter("weight")
        if weight[0].numel() != self.weight.shape[1]:
            raise ValueError(
                f"the fitted head sees {self.weight.shape[1]} features, backbone.name={backbone.name} has "
                f"{weight[0].numel()}. Set head=core to fit one, or head=random"
            )
        rows = [self.classes.index(name) for name in classes or self.classes]
        weight.copy_(factor * self.weight[rows].reshape(weight.shape))
        if isinstance(layer.bias, nn.Parameter):
            layer.bias.copy_(factor * self.bias[rows])

    def write(self, file: Path) -> None:
        """Keep it with the run.

        Args:
            file: Where to write.
        """
        told = {"classes": list(self.classes), "contents": sorted(self.contents), "ridge": self.ridge}
        told |= {"accuracy": self.accuracy, "steepness": self.steepness}
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_name(f"{file.name}.partial")
        save_file({"weight": self.weight, "bias": self.bias}, partial, {n: json.dumps(v) for n, v in told.items()})
        partial.replace(file)

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read what `write` wrote.

        Args:
            file: Where it was written.

        Returns:
            The head.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It holds something else.
        """
        if not file.is_file():
            raise FileNotFoundError(f"no fitted head at {file}. Set head=core to fit one, or head=random")
        with safe_open(file, "pt") as content:
            told = {name: json.loads(value) for name, value in (content.metadata() or {}).items() if value}
            names = {"classes", "contents", "ridge", "accuracy", "steepness"}
            if not names <= told.keys() or set(content.keys()) != {"weight", "bias"}:
                raise ValueError(f"{file} is no {FILE} of a run. Set head=core to fit a head, or head=random")
            tensors = {name: content.get_tensor(name) for name in ("weight", "bias")}
        classes, contents = tuple(told["classes"]), frozenset(told["contents"])
        return cls(tensors["weight"], tensors["bias"], classes, contents, told["ridge"], told["accuracy"],
                   told["steepness"])  # fmt: skip


def fit_head(backbone: Backbone, data: ImageDataModule, device: torch.device | str = "cpu") -> FittedHead:
    """Fit a head to the core images, all that have a label, whether this run trains on them or not.

    Every rank of a process group takes its share of one pass, and all get the same head. Random numbers are afterwards
    what they were.

    Args:
        backbone: The network, which is afterwards where it was.
        data: The data, whose manifest knows the core and whose normalization is that of the network.
        device: Where features are computed.

    Returns:
        The head.
    """
    rows = core_rows(data)
    loader = data.chosen_dataloader(torch.from_numpy(rows["index"].to_numpy(copy=True)))
    data.manifest.hash_contents()
    contents = frozenset(data.manifest.table.loc[rows["index"], "sha"])
    layer = backbone.model.get_submodule(backbone.head)
    features, label, index = _evaluate(backbone, loader, torch.device(device))
    # Every rank fits by itself, to the same rows.
    packed, _ = current_reducer().gather_rows(torch.cat([features, label[:, None].double()], 1), index)
    intercept = isinstance(layer.bias, nn.Parameter)
    return fit_probe(packed[:, :-1], packed[:, -1].long(), data.classes, contents, intercept=intercept)


def core_rows(data: ImageDataModule) -> pd.DataFrame:
    """Look up the core images that have a label.

    Args:
        data: The data, set up.

    Returns:
        Their rows of the manifest.
    """
    rows = data.manifest.labeled_rows()
    return rows[rows["core"] != ""]


@torch.no_grad()
def _evaluate(backbone: Backbone, loader: DataLoader[Batch], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    width = backbone.model.get_submodule(backbone.head).get_parameter("weight")[0].numel()
    # A rank may have no images.
    features = [torch.zeros(0, width, dtype=torch.float64, device=device)]
    labels, indices = ([torch.zeros(0, dtype=torch.int64, device=device)] for _ in range(2))
    home = next(backbone.model.parameters()).device
    backbone.model.to(device)
    # Iterating over a loader draws a number, which training shall not miss.
    with evaluation_mode(backbone.model), torch.random.fork_rng(devices=[]):
        for batch in track(loader, "fitting the head", total=len(loader)):
            if len(batch.target):
                features.append(penultimate_features(backbone, batch.input.to(device)).double())
                labels.append(batch.target.to(device))
                indices.append(batch.index.to(device))
    backbone.model.to(home)
    return torch.cat(features), torch.cat(labels), torch.cat(indices)


def fit_probe(
    features: Tensor, label: Tensor, classes: Sequence[str], contents: frozenset[str], *, intercept: bool = True
) -> FittedHead:
    r"""The ridge probe of the best exact leave-one-out accuracy, ties broken by the squared residual.

    .. math:: \frac{1}{2n} \sum_i \lVert W x_i + b - e_{y_i} \rVert^2 + \frac{\rho\,\bar v}{2} \lVert W \rVert^2

    with :math:`\bar v` the mean variance of the features and the intercept b free of penalty.

    Args:
        features: Rows x_i (n, F).
        label: Class positions (n,).
        classes: Class names (C,).
        contents: Hashes of the images.
        intercept: Whether b is fitted; otherwise it is 0.

    Returns:
        The head.

    Raises:
        ValueError: All images have the same features.
    """
    target = one_hot(label, len(classes)).double()
    spread = float(features.double().var(0, correction=0).mean())
    if not spread > 0:
        raise ValueError(
            f"all {len(features)} core images have the same features, to which no head can be fitted. Set another "
            "backbone.weights, or head=random"
        )
    best: tuple[tuple[float, float], float, PrimalFactor, Tensor] | None = None
    for ridge in RIDGES:
        problem = QuadraticProblem(torch.zeros_like(target), target, ridge * spread * len(target), intercept=intercept)
        factor = PrimalFactor(problem, Features(features.unsqueeze(1)))
        prediction = leave_one_out(factor).prediction
        quality = (float(held_out_accuracy(prediction, target)), -float(held_out_press(prediction, target)))
        if best is None or quality > best[0]:
            best = quality, ridge, factor, prediction
    assert best is not None  # noqa: S101 there are ridges
    (accuracy, _), ridge, factor, prediction = best
    temperature = float(held_out_cross_entropy(prediction, target)[1])
    steepness = min(1 / temperature, _STEEPEST) if math.isfinite(temperature) else 1.0
    weight, bias = factor.weights[: features.shape[1]].T, factor.solution().intercept
    stored = (weight.float().cpu().contiguous(), bias.float().cpu().contiguous())
    return FittedHead(*stored, tuple(classes), contents, ridge, accuracy, steepness)
