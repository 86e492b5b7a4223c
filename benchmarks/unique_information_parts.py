"""The measured parts of `unique_information.py`: what the expansion predicts, and training again without a sample."""

import copy
from collections.abc import Callable, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images_from_folder import load_folder
from step_cost import clock
from torch import Tensor, nn

from lqf_lightning.backbones import create_backbone
from lqf_lightning.linear import (
    KernelSpectrum,
    LinearizedModel,
    QuadraticProblem,
    StreamedJacobian,
    assemble_kernel,
    descend,
    leave_one_out_descent,
)

CLASSES, CHUNK = 10, 25
PENALTIES = {"none": 1e-9, "penalty": 0.1}  # the ridge over the kernel's largest eigenvalue


class Case:
    """Images of one set and the network before training."""

    def __init__(self, folder: Path, train: int, val: int, side: int, head_std: float) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        options: dict[str, Any] = {"weights": "package", "image_size": side, "head_std": head_std}
        backbone = create_backbone("tf_efficientnet_lite0", CLASSES, **options)
        images, labels = load_folder(folder, train + val, side, backbone.mean, backbone.std)
        images = images.to(self.device)
        self.x, self.x_val = images[:train], images[train:]
        self.target = F.one_hot(labels[:train], CLASSES).double().to(self.device)
        self.network, self.groups = backbone.model.to(self.device).eval(), backbone.groups

    def linearized(self) -> LinearizedModel:
        """A fresh expansion of the network around its weights."""
        return LinearizedModel(copy.deepcopy(self.network), example=self.x[:2])

    @cached_property
    def labels(self) -> Tensor:
        """Class positions of the training images."""
        return self.target.argmax(1)


def predict(case: Case, size: Mapping[str, Any]) -> dict[str, Any]:
    """Descent without every sample in turn, from the kernel alone; with and without a penalty."""
    start, model = clock(case.device), case.linearized()
    pair = assemble_kernel(model, case.groups, case.x.split(CHUNK), case.x_val.split(CHUNK))
    initial = StreamedJacobian(model, case.x.split(CHUNK)).initial()
    top = float(torch.linalg.eigvalsh(pair.train.total()[0])[-1])
    head = float(pair.train.groups["head"].double().diagonal(dim1=1, dim2=2).sum())
    share = head / float(pair.train.total().diagonal(dim1=1, dim2=2).sum())
    figures: dict[str, Any] = {"top": top, "share_of_head": share, "assembly_seconds": clock(case.device) - start}
    for name, share in PENALTIES.items():
        start, ridge = clock(case.device), share * top
        step = size["step_share"] / (top + ridge)
        spectrum = KernelSpectrum(QuadraticProblem(initial, case.target, ridge), pair.train)
        result = leave_one_out_descent(spectrum, step, size["steps"], cross=pair.cross)
        outputs = descend(spectrum, step, size["steps"]).outputs
        if result.function_change is None:
            raise RuntimeError("there were no validation images")
        figures[name] = {
            "ridge": ridge, "step": step, "steps": size["steps"], "learning_rate_of_the_mean_loss": step * len(case.x),
            "weights": result.weight_change.tolist(), "predictions": result.function_change.tolist(),
            "loss_before": loss_of(initial, case.target), "loss_after": loss_of(outputs, case.target),
            "accuracy_after": float((outputs.argmax(1) == case.labels).double().mean()),
            "seconds": clock(case.device) - start,
        }  # fmt: skip
    return figures


def loss_of(outputs: Tensor, target: Tensor) -> float:
    """Mean squared error, half the squared distance per sample."""
    return 0.5 * float((outputs - target).square().sum(1).mean())


def retrain(case: Case, kind: str, plan: Mapping[str, Any], without: int | None = None) -> dict[str, Any]:
    """Full-batch gradient descent on the sum form from the pre-trained weights, batch normalization frozen."""
    start, kept = clock(case.device), torch.arange(len(case.x), device=case.device)
    kept = kept if without is None else kept[kept != without]
    model, weights = _model(case, kind)
    origin = [weight.detach().clone() for weight in weights]
    before = loss_of(_outputs(model, case.x[kept]), case.target[kept])
    for _ in range(plan["steps"]):
        _step(model, weights, origin, case, kept, plan)
    outputs = _outputs(model, case.x[kept])
    return {
        "moved": [(weight - first).detach().cpu() for weight, first in zip(weights, origin, strict=True)],
        "validation": _outputs(model, case.x_val).cpu(), "loss_before": before,
        "loss_after": loss_of(outputs, case.target[kept]),
        "accuracy_after": float((outputs.argmax(1) == case.labels[kept]).double().mean()),
        "seconds": clock(case.device) - start,
    }  # fmt: skip


def compare(full: Mapping[str, Any], other: Mapping[str, Any]) -> dict[str, float]:
    """What the missing sample changed: squared norm for the weights, mean of it over images for the outputs."""
    pairs = zip(full["moved"], other["moved"], strict=True)
    weights = sum(float((one.double() - two.double()).square().sum()) for one, two in pairs)
    moved = full["validation"].double() - other["validation"].double()
    return {
        "weights": weights, "predictions": float(moved.square().sum(1).mean()),
        **{name: other[name] for name in ("loss_after", "accuracy_after", "seconds")},
    }  # fmt: skip


def _model(case: Case, kind: str) -> tuple[nn.Module, list[nn.Parameter]]:
    if kind == "lqf":
        model = case.linearized()
        return model, list(model.deltas.values())
    network = copy.deepcopy(case.network)
    return network, list(network.requires_grad_(True).parameters())


def _step(
    model: Callable[[Tensor], Tensor], weights: list[nn.Parameter], origin: list[Tensor], case: Case, kept: Tensor,
    plan: Mapping[str, Any],
) -> None:  # fmt: skip
    gradient = [torch.zeros_like(weight) for weight in weights]
    for rows in kept.split(CHUNK):
        loss = 0.5 * (model(case.x[rows]) - case.target[rows].float()).square().sum()
        for total, part in zip(gradient, torch.autograd.grad(loss, weights), strict=True):
            total += part
    with torch.no_grad():
        for weight, pull, first in zip(weights, gradient, origin, strict=True):
            weight -= plan["step"] * (pull + plan["ridge"] * (weight - first))


@torch.no_grad()
def _outputs(model: Callable[[Tensor], Tensor], images: Tensor) -> Tensor:
    return torch.cat([model(rows) for rows in images.split(CHUNK)]).double()
