"""Small random problems with known Jacobians, and ridge fits in weight space that know nothing of kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.kernel import Kernel, KernelForm
from lqf_lightning.linear.problem import QuadraticProblem

SCALES = {"body": 0.5, "head": 2.0}


@dataclass(frozen=True)
class Toy:
    """A problem, and features (blocks, n, c, P) in whose inner products its kernel consists.

    One block stands for c outputs that share their weights. Features are scaled so that the metric is the identity.
    """

    problem: QuadraticProblem
    kernel: Kernel
    cross: Kernel
    initial_other: Tensor
    features: Tensor
    features_other: Tensor


@dataclass(frozen=True)
class Refit:
    """An optimum in weight space: per block weights (blocks, P), intercept (C,), outputs on both sets of samples."""

    direction: Tensor
    intercept: Tensor
    outputs: Tensor
    outputs_other: Tensor


def make_toy(
    *,
    outputs: int = 3,
    ridge: float = 1.0,
    form: KernelForm = "full",
    intercept: bool = False,
    weights: Sequence[float] | None = None,
    linear: bool = False,
    samples: int = 9,
    others: int = 4,
    body: int = 30,
    seed: int = 0,
) -> Toy:
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw, dtype=torch.float64)

    sizes = {"body": body, "head": 4}
    jacobians = {name: normal(samples + others, outputs, size) + 0.5 for name, size in sizes.items()}
    targets, initial = 3 * normal(samples, outputs), normal(samples + others, outputs)
    problem = QuadraticProblem(
        initial[:samples],
        targets,
        ridge,
        None if weights is None else torch.tensor(weights, dtype=torch.float64),
        normal(samples, outputs) if linear else None,
        intercept,
    )
    parts = {name: _as_form(jacobian, form) for name, jacobian in jacobians.items()}
    features = torch.cat([SCALES[name] ** 0.5 * part for name, part in parts.items()], 3)
    rows = {name: part.flatten(1, 2) for name, part in parts.items()}
    grams = {
        name: row @ row[:, : samples * part.shape[2]].mT
        for (name, row), part in zip(rows.items(), parts.values(), strict=True)
    }
    cut = samples * features.shape[2]
    kernel = Kernel({name: gram[:, :cut] for name, gram in grams.items()}, outputs, form)
    cross = Kernel({name: gram[:, cut:] for name, gram in grams.items()}, outputs, form)
    return Toy(problem, kernel, cross, initial[samples:], features[:, :samples], features[:, samples:])


def _as_form(jacobian: Tensor, form: KernelForm) -> Tensor:
    if form == "full":
        return jacobian.unsqueeze(0)
    if form == "diagonal":
        return jacobian.transpose(0, 1).unsqueeze(2)
    outputs = jacobian.shape[1]
    wide = jacobian.flatten(1) / outputs**0.5 if form == "trace" else jacobian[:, 0]
    return wide[None, :, None]


def blockwise(toy: Toy) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Independent problems: features (n, c, P), those of other samples, and the outputs that they explain."""
    count, coupled = toy.features.shape[0], toy.features.shape[2]
    total = toy.problem.outputs // coupled
    columns = torch.arange(toy.problem.outputs).reshape(total, coupled)
    return [(toy.features[b % count], toy.features_other[b % count], columns[b]) for b in range(total)]


def refit(toy: Toy, keep: Sequence[int] | None = None, weight: Tensor | None = None) -> Refit:
    """The optimum on the kept samples, by the normal equations of weights and intercept together."""
    problem = toy.problem
    chosen = torch.arange(problem.samples) if keep is None else torch.tensor(keep, dtype=torch.long)
    weight = problem.root_weight.square()[:, 0] if weight is None else weight
    directions, intercepts = [], torch.zeros(problem.outputs, dtype=torch.float64)
    outputs, outputs_other = problem.initial.double().clone(), toy.initial_other.clone()
    for features, other, columns in blockwise(toy):
        direction, intercept = _fit(problem, features[chosen], chosen, columns, weight[chosen])
        directions.append(direction)
        intercepts[columns] = intercept
        outputs[:, columns] += features @ direction + intercept
        outputs_other[:, columns] += other @ direction + intercept
    return Refit(torch.stack(directions), intercepts, outputs, outputs_other)


def _fit(
    problem: QuadraticProblem, features: Tensor, chosen: Tensor, columns: Tensor, weight: Tensor
) -> tuple[Tensor, Tensor]:
    size, coupled = features.shape[2], features.shape[1]
    ones = torch.eye(coupled, dtype=torch.float64).expand(len(chosen), -1, -1)
    rows = torch.cat([features, ones], 2) if problem.intercept else features
    residual = (problem.target.double() - problem.initial.double())[chosen][:, columns]
    pull = weight[:, None] * residual - problem.linear_terms[chosen][:, columns]
    hessian = torch.einsum("i,icp,icq->pq", weight, rows, rows)
    hessian.diagonal()[:size] += problem.ridge
    found = torch.linalg.solve(hessian, torch.einsum("icp,ic->p", rows, pull))
    return found[:size], found[size:] if problem.intercept else torch.zeros(coupled, dtype=torch.float64)


def without(toy: Toy, removed: Sequence[int]) -> Refit:
    """The optimum without some samples."""
    return refit(toy, [i for i in range(toy.problem.samples) if i not in removed])


def near(got: Tensor, expected: Tensor, tolerance: float = 1e-9) -> bool:
    """Equal up to a fraction of the largest expected number."""
    scale = max(float(expected.abs().max()), 1e-3)
    return got.shape == expected.shape and float((got - expected).abs().max()) < tolerance * scale
