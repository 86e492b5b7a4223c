"""Runs of exact solvers on the tiny network, and the dense problem that they have to solve."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from lqf_lightning.methods import LQF
from methods.dense_lqf import DenseProblem, flat, penalized
from methods.tensors import TensorData, build_trainer, draw, fit_on


class Note(Callback):
    """The logged values, dw and certificate after each epoch."""

    def __init__(self) -> None:
        self.rows: list[dict[str, float]] = []
        self.deltas: list[Tensor] = []
        self.certificates: list[Any] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.rows.append({name: float(value) for name, value in trainer.callback_metrics.items()})
        self.deltas.append(flat(pl_module.linearized.deltas).clone())
        self.certificates.append(pl_module.solver.certificate)


def solve(
    method: LQF, *, samples: int = 11, batch_size: int = 4, epochs: int = 200, seed: int = 1,
    callbacks: Sequence[Callback] = (), **options: Any,
) -> Trainer:  # fmt: skip
    trainer = build_trainer(epochs, *callbacks)
    fit_on(trainer, method, TensorData(*draw(samples, seed), batch_size), **options)
    return trainer


def dense(
    method: LQF,
    samples: int = 11,
    factors: Mapping[str, float] | None = None,
    metric: Tensor | None = None,
    seed: int = 1,
) -> DenseProblem:
    """The problem of `method` on the same samples; `factors` of the ridge by layer group."""
    deltas = method.linearized.deltas
    if metric is None:
        owner = {n: g for g, members in method.backbone.groups.items() for n in members}
        weights = {n: (factors or {}).get(owner[n], 1.0) for n in deltas}
        diagonal = torch.cat([torch.full((d.numel(),), weights[n], dtype=torch.float64) for n, d in deltas.items()])
        metric = torch.diag(penalized(list(deltas)) * diagonal if method.intercept_name else diagonal)
    return DenseProblem(*draw(samples, seed), list(deltas), samples * method.ridge, metric)
