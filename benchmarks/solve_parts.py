"""The ways to solve the problem that `solve.py` compares, each with a record of its steps."""

import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images_from_folder import load_folder
from torch import Tensor

from lqf_lightning.backbones import Backbone, create_backbone
from lqf_lightning.linear import (
    DualPrecondition,
    KernelSpectrum,
    LinearizedModel,
    Metric,
    QuadraticProblem,
    StreamedJacobian,
    assemble_kernel,
    fit_kfac,
    regularization_path,
    sketch_rows,
    solve_cg,
    top_curvature,
)  # fmt: skip

ALPHA, CHUNK, BATCH = 15.0, 32, 32
TIGHT = 1e-4  # relative gradient at which descents end


class Case:
    """One set of images, the linearized network, and its problem."""

    def __init__(self, folder: Path, size: dict[str, int]) -> None:
        self.size = size
        torch.manual_seed(0)
        classes = len(list((folder / "train").iterdir()))
        self.backbone = self.build(classes)
        mean, std = self.backbone.mean, self.backbone.std
        images, target = load_folder(folder / "train", size["train"] + size["val"], size["side"], mean, std)
        cut = size["train"]
        self.x, self.y, self.x_val, self.y_val = images[:cut], target[:cut], images[cut:], target[cut:]
        self.model = LinearizedModel(self.backbone.model, example=self.x[:2])
        self.bias = f"{self.backbone.head}.bias"
        self.jacobian = StreamedJacobian(self.model, self.x.split(CHUNK))
        self.val_jacobian = StreamedJacobian(self.model, self.x_val.split(CHUNK))
        self.initial, self.val_initial = self.jacobian.initial(), self.val_jacobian.initial()
        self.target = ALPHA * F.one_hot(self.y, classes).double()

    def build(self, classes: int) -> Backbone:
        """The network with a fresh head, the same every time."""
        torch.manual_seed(0)
        return create_backbone("tf_efficientnet_lite0", classes, weights="package", image_size=self.size["side"])

    def problem(self, ridge: float, intercept: bool = True) -> QuadraticProblem:
        """The problem in sum form."""
        return QuadraticProblem(self.initial, self.target, ridge, intercept=intercept)

    def val_accuracy(self, movement: dict[str, Tensor], intercept: Tensor) -> float:
        """Of a movement of the weights."""
        outputs = self.val_initial + self.val_jacobian.push(movement)[0] + intercept
        return float((outputs.argmax(1) == self.y_val).double().mean())


def automatic_ridge(case: Case) -> dict[str, Any]:
    """The ridge with the best leave-one-out accuracy of the trace kernel, and what choosing it costs."""
    start = time.process_time()
    kernel = assemble_kernel(case.model, groups_of(case), case.x.split(CHUNK), form="trace", combinations=2).train
    path = regularization_path(KernelSpectrum(case.problem(1.0), kernel))
    ridge = path.choose(by="accuracy")
    where = int((path.ridges - ridge).abs().argmin())
    return {
        "ridge": ridge, "seconds": time.process_time() - start, "surrogate_accuracy": float(path.accuracy[where]),
        "relative_to_mean_diagonal": ridge / float(kernel.total().diagonal(dim1=-2, dim2=-1).mean()),
    }  # fmt: skip


def groups_of(case: Case) -> dict[str, list[str]]:
    """Penalized parameters by layer group."""
    return {group: [n for n in names if n != case.bias] for group, names in case.backbone.groups.items()}


def descend(
    case: Case, ridge: float, steps: int, *, intercept: bool = True, kfac: dict[str, Any] | None = None,
    sketch: int | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Conjugate gradients; a record of every step."""
    start, chosen = time.process_time(), {}
    if kfac is not None:
        factor = kfac.pop("factor", 10.0)
        options = {"damping": ridge / len(case.x), "relative_floor": 0.0, "intercept": case.bias, **kfac}
        fitted = fit_kfac(case.model, None, case.x.split(CHUNK), **options)
        chosen["precondition"] = lambda r: Metric().curvature_solver(fitted, len(case.x), r, factor)
    if sketch is not None:
        rows = sketch_rows(case.model, groups_of(case), case.x.split(CHUNK), sketch * case.target.numel())
        inverse = DualPrecondition.of_rows(case.problem(ridge), rows)
        chosen["approximate_inverse"] = lambda problem: inverse
    setup = time.process_time() - start
    record, paused = [], 0.0

    def note(descents: Any) -> None:
        nonlocal paused
        stopped = time.process_time()
        descent = descents[0]
        record.append({
            "seconds": stopped - start - paused, "objective": descent.objective,
            "relative_gradient": descent.certificate.relative_gradient,
            "val_acc": case.val_accuracy(descent.movement, descent.intercept),
        })  # fmt: skip
        paused += time.process_time() - stopped

    solve_cg(
        [case.problem(ridge, intercept)], case.jacobian, tolerance=TIGHT, max_steps=steps,
        exclude=(case.bias,) if intercept else (), note=note, **chosen,
    )  # fmt: skip
    return {"setup": setup, "steps": record}


def descend_dual(case: Case, ridge: float, steps: int) -> dict[str, Any]:
    """Conjugate gradients on the coefficients, preconditioned by the inverse of the trace kernel on every output."""
    start = time.process_time()
    matrix = assemble_kernel(
        case.model, groups_of(case), case.x.split(CHUNK), form="trace", combinations=4
    ).train.total()[0]
    inverse = torch.linalg.inv(matrix + ridge * torch.eye(len(matrix), dtype=matrix.dtype))
    ones = inverse.sum(1, keepdim=True)
    setup = time.process_time() - start
    residual = case.target - case.initial.double()
    centered = residual - residual.mean(0)
    first = math.sqrt(_squared(case, case.jacobian.pull(centered)[0]))
    record, paused = [], 0.0
    movement = {n: torch.zeros_like(d) for n, d in case.model.deltas.items() if n != case.bias}

    def precondition(rows: Tensor) -> Tensor:
        rows = inverse @ rows  # the intercept's multiplier makes the sum of the coefficients zero
        return rows - ones * rows.sum(0) / ones.sum()

    direction = precondition(residual)
    slope = float((residual * direction).sum())
    for _ in range(steps):
        pulled = {n: g for n, g in case.jacobian.pull(direction)[0].items() if n != case.bias}
        image = case.jacobian.push(pulled)[0].double() + ridge * direction
        length = slope / float((direction * image).sum())
        residual -= length * image
        for name, entry in movement.items():
            entry.add_(pulled[name], alpha=length)
        stopped = time.process_time()
        centered = residual - residual.mean(0)
        norm = math.sqrt(_squared(case, case.jacobian.pull(centered)[0]))
        record.append({
            "seconds": stopped - start - paused, "relative_gradient": norm / first,
            "val_acc": case.val_accuracy(movement, residual.mean(0)),
        })  # fmt: skip
        paused += time.process_time() - stopped
        if norm < TIGHT * first:
            break
        step = precondition(residual)
        slope, before = float((residual * step).sum()), slope
        direction = step + slope / before * direction
    return {"setup": setup, "steps": record}


def _squared(case: Case, gradient: dict[str, Tensor]) -> float:
    return sum(float(entry.double().square().sum()) for name, entry in gradient.items() if name != case.bias)


def stochastic(case: Case, ridge: float, epochs: int) -> dict[str, Any]:
    """K-FAC-preconditioned SGD with momentum and a cosine schedule on the same problem."""
    start, samples = time.process_time(), len(case.x)
    mu = ridge / samples
    kfac = fit_kfac(case.model, None, case.x.split(CHUNK), damping=mu, cotangents="random")
    top = top_curvature(case.model, [case.x[:BATCH]], ridge=mu, precondition=kfac.precondition)
    setup, deltas = time.process_time() - start, case.model.deltas
    steps = epochs * math.ceil(samples / BATCH)
    optimizer = torch.optim.SGD(deltas.values(), lr=0.5 / top, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    record, paused = [], 0.0
    generator = torch.Generator().manual_seed(0)
    for _ in range(epochs):
        for rows in torch.randperm(samples, generator=generator).split(BATCH):
            error = case.model(case.x[rows]) - case.target[rows].float()
            gradients = torch.autograd.grad(0.5 * error.square().sum() / len(rows), list(deltas.values()))
            penalized = {
                n: g + (mu * d.detach() if n != case.bias else 0.0)
                for (n, d), g in zip(deltas.items(), gradients, strict=True)
            }
            for name, direction in kfac.precondition(penalized).items():
                deltas[name].grad = direction
            optimizer.step()
            schedule.step()
        stopped = time.process_time()
        record.append({"seconds": stopped - start - paused, **_evaluate(case, ridge)})
        paused += time.process_time() - stopped
    with torch.no_grad():
        for delta in deltas.values():
            delta.zero_()
    return {"setup": setup, "steps": record}


def _evaluate(case: Case, ridge: float) -> dict[str, float]:
    movement = {n: d.detach().clone() for n, d in case.model.deltas.items()}
    error = case.initial.double() + case.jacobian.push(movement)[0] - case.target
    bias = movement.pop(case.bias)
    objective = 0.5 * float(error.square().sum()) + 0.5 * ridge * Metric().squared_norm(movement)
    return {"objective": objective, "val_acc": case.val_accuracy(movement, bias)}


def fine_tune(case: Case, rate: float, epochs: int) -> dict[str, Any]:
    """Ordinary fine-tuning: cross-entropy, SGD with Nesterov momentum, one cycle, batch statistics, flips, shifts."""
    start = time.process_time()
    model = case.build(case.target.shape[1]).model
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, nesterov=True, weight_decay=5e-4)
    total = epochs * (len(case.x) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, max(total, 4))
    generator = torch.Generator().manual_seed(0)
    record, paused = [], 0.0
    for _ in range(epochs):
        model.train()
        for rows in torch.randperm(len(case.x), generator=generator).split(BATCH):
            if len(rows) < BATCH:
                continue
            images = F.pad(case.x[rows], (4, 4, 4, 4), "reflect")
            shift = torch.randint(0, 9, (2,), generator=generator).tolist()
            side = case.size["side"]
            images = images[:, :, shift[0] : shift[0] + side, shift[1] : shift[1] + side]
            images = images.flip(3) if torch.rand((), generator=generator) < 0.5 else images
            optimizer.zero_grad()
            F.cross_entropy(model(images), case.y[rows]).backward()
            optimizer.step()
            schedule.step()
        stopped = time.process_time()
        model.eval()
        with torch.no_grad():
            found = torch.cat([model(x).argmax(1) for x in case.x_val.split(CHUNK)])
        record.append({"seconds": stopped - start - paused, "val_acc": float((found == case.y_val).double().mean())})
        paused += time.process_time() - stopped
    return {"setup": 0.0, "steps": record}
