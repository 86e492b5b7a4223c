"""The measured parts of `leave_one_out.py`: the problem, the scores of all samples, and refits without one."""

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from images_from_folder import load_folder
from step_cost import clock
from torch import Tensor

from lqf_lightning.backbones import create_backbone
from lqf_lightning.linear import (
    DualFactor,
    DualPrecondition,
    Kernel,
    KernelSpectrum,
    LinearizedModel,
    Metric,
    QuadraticProblem,
    StreamedJacobian,
    assemble_kernel,
    fit_kfac,
    leave_one_out,
    regularization_path,
    sketch_rows,
    solve_cg,
)  # fmt: skip

ALPHA, CLASSES, CHUNK = 15.0, 10, 32
FORMS: dict[str, dict[str, Any]] = {
    "exact": {"form": "full"},
    "trace": {"form": "trace"},
    "trace_2": {"form": "trace", "combinations": 2},
    "last_layer": {"form": "last_layer"},
}
TOLERANCE, DOUBLE_TOLERANCE = 1e-4, 1e-9


class Case:
    """Images, the linearized network, and its problem."""

    def __init__(self, data: Path, train: int, val: int, side: int, dtype: torch.dtype = torch.float32) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(0)
        backbone = create_backbone("tf_efficientnet_lite0", CLASSES, weights="package", image_size=side)
        folder = data / "dtd10" / "train"
        images, labels = load_folder(folder, train + val, side, backbone.mean, backbone.std)
        images = images.to(self.device, dtype)
        self.x, self.x_val, labels = images[:train], images[train:], labels[:train].to(self.device)
        self.model = LinearizedModel(backbone.model.to(self.device, dtype), example=self.x[:2])
        self.bias = f"{backbone.head}.bias"
        self.groups = {g: own for g, names in backbone.groups.items() if (own := [n for n in names if n != self.bias])}
        self.head = {"head": self.groups["head"]}
        self.target = ALPHA * F.one_hot(labels, CLASSES).double()
        self.jacobian = StreamedJacobian(self.model, self.x.split(CHUNK))
        self.val_jacobian = StreamedJacobian(self.model, self.x_val.split(CHUNK))

    @cached_property
    def initial(self) -> Tensor:
        """Outputs on the training images before training."""
        return self.jacobian.initial()

    @cached_property
    def val_initial(self) -> Tensor:
        """Outputs on the validation images before training."""
        return self.val_jacobian.initial()

    @cached_property
    def sketch(self) -> tuple[Tensor, float]:
        """A sketch of the Jacobian, and the seconds it took."""
        start = clock(self.device)
        rows = sketch_rows(self.model, self.groups, self.x.split(CHUNK), 4 * self.target.numel())
        return rows, clock(self.device) - start

    def problem(self, ridge: float, without: int | None = None) -> QuadraticProblem:
        """The problem in sum form, with or without a sample."""
        weight = torch.ones(len(self.x), dtype=torch.float64, device=self.device)
        if without is not None:
            weight[without] = 0
        return QuadraticProblem(self.initial, self.target, ridge, weight=weight, intercept=True)


def choose_ridge(case: Case) -> dict[str, Any]:
    """The ridge with the best leave-one-out accuracy of the trace kernel, and of the last layer for itself."""
    start = clock(case.device)
    found: dict[str, Any] = {}
    for name, groups in (("trace", case.groups), ("last_layer", case.head)):
        kernel = assemble_kernel(case.model, groups, case.x.split(CHUNK), **FORMS[name]).train
        path = regularization_path(KernelSpectrum(case.problem(1.0), kernel))
        ridge = path.choose(by="accuracy")
        accuracy = path.accuracy[(path.ridges - ridge).abs().argmin()] if path.accuracy is not None else 0.0
        relative = ridge / float(kernel.total().diagonal(dim1=-2, dim2=-1).mean())
        found[name] = {"ridge": ridge, "accuracy": float(accuracy), "relative_to_mean_diagonal": relative}
    return {**found, "seconds": clock(case.device) - start}


def score(case: Case, name: str, ridge: float) -> dict[str, Any]:
    """All samples by one kernel: alone, and once more with the change of the outputs on validation images."""
    groups = case.head if name == "last_layer" else case.groups
    case.initial, case.val_initial  # noqa: B018  # the outputs before training are no part of the scores
    figures: dict[str, Any] = {}
    for kind, others in (("alone", ()), ("with_validation", case.x_val.split(CHUNK))):
        start = clock(case.device)
        pair = assemble_kernel(case.model, groups, case.x.split(CHUNK), others, **FORMS[name])
        assembled = clock(case.device)
        factor = DualFactor(case.problem(ridge), pair.train)
        result = leave_one_out(factor, pair.cross)
        end = clock(case.device)
        figures[kind] = {"assembly": assembled - start, "scores": end - assembled, "total": end - start}
    if pair.cross is None or result.function_change is None:
        raise RuntimeError("there were no validation images")
    right = result.prediction.argmax(1) == case.target.argmax(1)
    figures |= {
        "residual": result.residual.tolist(), "function_change": result.function_change.tolist(),
        "accuracy": float(right.double().mean()),
    }  # fmt: skip
    if name == "exact":
        figures["validation"] = factor.predict(pair.cross, case.val_initial).tolist()
        figures["row_norm"] = centered_norms(pair.train)
    return figures


def centered_norms(kernel: Kernel) -> list[float]:
    """Spectral norm of a sample's rows of the Jacobian, less their mean over the other samples."""
    c = kernel.coupled
    blocks = kernel.total()[0]
    blocks = blocks.view(len(blocks) // c, c, len(blocks) // c, c)
    norms = []
    for i in range(len(blocks)):
        weights = torch.full((len(blocks),), -1 / (len(blocks) - 1), dtype=torch.float64, device=blocks.device)
        weights[i] = 1
        own = torch.einsum("i,iajb,j->ab", weights, blocks, weights)
        norms.append(float(torch.linalg.eigvalsh(own)[-1].clamp_min(0).sqrt()))
    return norms


def refit(case: Case, ridge: float, sample: int, steps: int, kind: str, tolerance: float = TOLERANCE) -> Any:
    """Train without a sample, from zero; what all refits share, a sketch of the Jacobian, is timed by itself."""
    case.initial, case.val_initial  # noqa: B018  # see above
    taken: list[float] = []
    setup, chosen, start = 0.0, {}, clock(case.device)
    if kind == "kfac":
        options: dict[str, Any] = {"form": "reduce", "cotangents": "random", "intercept": case.bias}
        damping = ridge / len(case.x)
        fitted = fit_kfac(case.model, None, case.x.split(CHUNK), damping=damping, relative_floor=0.0, **options)
        chosen["precondition"] = lambda r: Metric().curvature_solver(fitted, len(case.x), r, 10.0)
        setup, start = clock(case.device) - start, clock(case.device)
    if kind == "sketch":
        rows, setup = case.sketch
        start = clock(case.device)
        chosen["approximate_inverse"] = lambda problem: DualPrecondition.of_rows(problem, rows)
    solution = solve_cg(
        [case.problem(ridge, sample)], case.jacobian, tolerance=tolerance, max_steps=steps, exclude=(case.bias,),
        note=lambda descents: taken.append(descents[0].certificate.relative_gradient), **chosen,
    )[0]  # fmt: skip
    seconds = clock(case.device) - start
    outputs = case.val_initial + case.val_jacobian.push(solution.direction or {})[0] + solution.intercept
    return {
        "sample": sample, "kind": kind, "seconds": seconds, "setup": setup, "steps": len(taken),
        "relative_gradient": taken[-1], "converged": taken[-1] <= tolerance,
        "distance_bound": solution.certificate.distance_bound,
        "residual": (case.target[sample] - solution.outputs[sample]).tolist(), "validation": outputs.tolist(),
    }  # fmt: skip


def check_in_double(data: Path, size: Mapping[str, Any]) -> dict[str, Any]:
    """A small problem in double precision, solved much tighter."""
    case = Case(data, size["double"], 2, 32, torch.float64)
    kernel = assemble_kernel(case.model, case.groups, case.x.split(CHUNK)).train
    ridge = 0.1 * float(kernel.total().diagonal(dim1=-2, dim2=-1).mean())
    wanted = leave_one_out(DualFactor(case.problem(ridge), kernel)).residual
    found = refit(case, ridge, 0, 400, "plain", DOUBLE_TOLERANCE)
    error = relative(wanted[0], torch.tensor(found["residual"], device=case.device))
    return {"samples": len(case.x), "relative_error": error, "relative_gradient": found["relative_gradient"]}


def relative(found: Tensor, wanted: Tensor) -> float:
    """Error of a vector, relative."""
    return float((found - wanted).norm() / wanted.norm())
