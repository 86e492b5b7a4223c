"""The linear-quadratic problem of the tiny network, written out with its dense Jacobian."""

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call, jacrev
from torch.nn.functional import one_hot

from lqf_lightning.linear import fit_kfac
from lqf_lightning.methods import LQF
from methods.tensors import CLASSES, build_backbone

ALPHA, RIDGE, RATE = 5.0, 0.3, 0.02
SGD = partial(torch.optim.SGD, lr=RATE)
EXACT = partial(fit_kfac, cotangents="exact", relative_floor=0.0)


def build(**options: Any) -> LQF:
    return LQF(
        build_backbone(),
        CLASSES,
        **{"optimizer": SGD, "target_scale": ALPHA, "ridge": RIDGE, "normalize_step": False, **options},
    )


def jacobian(images: Tensor, names: list[str]) -> Tensor:
    """(B, C, P) of the untrained network over the named parameters, by plain reverse mode."""
    model = build_backbone().model
    weights = {name: p.detach() for name, p in model.named_parameters()}
    blocks = jacrev(lambda own: functional_call(model, weights | own, (images,)))({n: weights[n] for n in names})
    return torch.cat([blocks[name].flatten(2) for name in names], 2)


def outputs_at_start(images: Tensor) -> Tensor:
    return build_backbone().model(images).detach()


def penalized(names: list[str]) -> Tensor:
    """One for every entry that carries the penalty, zero for the intercept."""
    sizes = dict(build_backbone().model.named_parameters())
    return torch.cat([torch.full((sizes[n].numel(),), float(n != "fc.bias"), dtype=torch.float64) for n in names])


def flat(values: dict[str, Tensor]) -> Tensor:
    return torch.cat([value.detach().flatten() for value in values.values()])


def scatter_deltas(method: LQF, seed: int = 5) -> Tensor:
    """Move dw away from zero; returns it as one vector."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for delta in method.linearized.deltas.values():
            delta.copy_(0.1 * torch.randn(delta.shape, generator=generator, dtype=torch.float64))
    return flat(method.linearized.deltas)


def split(vector: Tensor, method: LQF) -> dict[str, Tensor]:
    deltas = method.linearized.deltas
    parts = vector.split([delta.numel() for delta in deltas.values()])
    return {name: part.view(delta.shape) for (name, delta), part in zip(deltas.items(), parts, strict=True)}


class DenseProblem:
    """`min 1/2 sum |f0 + J dw - y|^2 + ridge/2 dw^T M dw` by its normal equations; `ridge` in sum form.

    The intercept is an ordinary entry of dw, whose rows and columns of M are zero.
    """

    def __init__(
        self, images: Tensor, target: Tensor, names: list[str], ridge: float, metric: Tensor | None = None
    ) -> None:
        self.ridge, self.metric = ridge, torch.diag(penalized(names)) if metric is None else metric
        self.start, self.target = outputs_at_start(images), ALPHA * one_hot(target, 3)
        self.rows = jacobian(images, names)
        flat_rows = self.rows.flatten(0, 1)
        self.hessian = flat_rows.T @ flat_rows + ridge * self.metric
        self.free = self.metric.diagonal() == 0

    def optimum(self) -> Tensor:
        return torch.linalg.solve(self.hessian, -torch.einsum("bcp,bc->p", self.rows, self.start - self.target))

    def outputs(self, dw: Tensor) -> Tensor:
        return self.start + self.rows @ dw

    def objective(self, dw: Tensor) -> float:
        error = self.outputs(dw) - self.target
        return float(0.5 * error.square().sum() + 0.5 * self.ridge * dw @ self.metric @ dw)

    def gradient_length(self, dw: Tensor) -> float:
        """Of the penalized entries, in the norm of the inverse metric, the intercept at its optimum."""
        dw = dw.clone()
        dw[self.free] = 0
        free = self.free.nonzero().flatten()
        gradient = self.hessian @ dw + torch.einsum("bcp,bc->p", self.rows, self.start - self.target)
        if len(free):
            dw[free] = -torch.linalg.solve(self.hessian[free][:, free], gradient[free])
            gradient = self.hessian @ dw + torch.einsum("bcp,bc->p", self.rows, self.start - self.target)
        gradient, metric = gradient[~self.free], self.metric[~self.free][:, ~self.free]
        return float((gradient @ torch.linalg.solve(metric, gradient)).sqrt())

    def length(self, dw: Tensor) -> float:
        return float((dw @ self.metric @ dw).sqrt())
