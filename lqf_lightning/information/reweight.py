"""Weights and choices of training samples that lower a held-out loss, by its exact derivative (DIVA)."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lqf_lightning.information.summarize import Judged
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.weighting import (
    HeldOutLoss,
    WeightDerivative,
    leave_one_out_derivative,
    validation_derivative,
)

Objective = Literal["leave_one_out", "validation"]
Derivative = Callable[[DualFactor], WeightDerivative]


@dataclass(frozen=True)
class Reweighting:
    """Sample weights after some steps.

    Attributes:
        weight: The weights (n,), not negative.
        losses: Held-out loss before the first step and after each that was kept.
        derivative: Derivative of the loss at the first weights (n,).
    """

    weight: Tensor
    losses: list[float]
    derivative: Tensor


@dataclass(frozen=True)
class Extension:
    """Samples of a pool that were added.

    Attributes:
        added: Their positions (k,), in the order in which they were added.
        losses: Held-out loss before the first round and after each.
        derivative: Derivative of the loss in the weight of every sample (n,) when the pool was looked at first.
    """

    added: Tensor
    losses: list[float]
    derivative: Tensor


def held_out_derivative(
    objective: Objective, loss: HeldOutLoss = "squared", *, judged: Judged | None = None, judge: Tensor | None = None
) -> Derivative:
    """Choose the loss that samples are to lower.

    Args:
        objective: "validation", or "leave_one_out", which needs no samples beside the training samples, but is biased
            as soon as weights have been chosen by it.
        loss: "squared" or "cross_entropy".
        judged: The validation samples.
        judge: For "leave_one_out", how much the loss on each training sample counts (n,); None means alike.

    Returns:
        A function of the solved problem.

    Raises:
        ValueError: `objective` has another name, or there are no validation samples.
    """
    if objective == "leave_one_out":
        return lambda factor: leave_one_out_derivative(factor, judge, loss)
    if objective != "validation":
        raise ValueError(f"`by` must be leave_one_out or validation, got {objective!r}. Set by=leave_one_out")
    if judged is None:
        raise ValueError("there are no validation samples to go by. Set by=leave_one_out")
    return lambda factor: validation_derivative(factor, judged.cross, judged.initial, judged.target, loss)


def reweight(
    problem: QuadraticProblem,
    kernel: Kernel,
    derivative: Derivative,
    scales: Mapping[str, float] | None = None,
    *,
    steps: int = 3,
    length: float = 0.5,
) -> Reweighting:
    r"""Move sample weights down the derivative of a held-out loss (DIVA, arXiv 2111.09785, section 4).

    .. math:: a \leftarrow \max(0,\; a - \ell\, \nabla L / \mathrm{rms}(\nabla L))

    A few long steps: the leave-one-out loss is unbiased at the first alone. A step that does not lower the loss is not
    taken, and ends it. Steps are measured in weight, so that the scale of the targets plays no part.

    Args:
        problem: The problem at the first weights.
        kernel: Inner products among the training samples.
        derivative: Of the loss, see `held_out_derivative`.
        scales: Inverse penalty weights by layer group.
        steps: Most steps.
        length: Root mean square of the change of the weights in a step.

    Returns:
        The weights.

    Raises:
        ValueError: `steps` or `length` is out of range.
    """
    if steps < 1 or not 0 < length < float("inf"):
        raise ValueError(
            f"`steps` must be at least 1 and `length` positive, got {steps} and {length}. Set steps=3 and length=0.5"
        )
    weight = problem.root_weight[:, 0].square()
    now = first = derivative(DualFactor(problem, kernel, scales))
    losses = [now.loss]
    for _ in range(steps):
        size = float(now.gradient.square().mean().sqrt())
        if size == 0:
            break
        moved = (weight - length / size * now.gradient.to(weight)).clamp_min(0.0)
        if not bool(moved.any()):
            break
        after = derivative(DualFactor(problem.with_(weight=moved), kernel, scales))
        if not after.loss < now.loss:
            break
        weight, now = moved, after
        losses.append(now.loss)
    return Reweighting(weight, losses, first.gradient)


def extend(
    problem: QuadraticProblem,
    kernel: Kernel,
    derivative: Derivative,
    pool: Tensor,
    scales: Mapping[str, float] | None = None,
    *,
    count: int,
    batch: int = 1,
) -> Extension:
    """Add samples of a pool that lower a held-out loss most, a few at a time (DIVA, arXiv 2111.09785, section 4).

    Samples that are not chosen take part with weight 0. What a sample would bring depends on those that have been
    added, so the derivative is taken anew in every round. It ends when no derivative is negative any more, or when a
    round has raised the loss, which derivatives at weight 0 do not exclude; that round is left out.

    Args:
        problem: The problem of core and pool together, its weights those of the core.
        kernel: Inner products among all of them.
        derivative: Of the loss, see `held_out_derivative`; by leave-one-out, `judge` should be the core.
        pool: Positions that may be added (p,), int64.
        scales: Inverse penalty weights by layer group.
        count: Most samples to add.
        batch: Samples per round.

    Returns:
        Those that were added.

    Raises:
        ValueError: `count` or `batch` is not positive, or the pool is empty.
    """
    if count < 1 or batch < 1 or len(pool) == 0:
        raise ValueError(
            f"`count` and `batch` must be at least 1 and the pool not empty, got {count}, {batch} and {len(pool)} "
            "samples. Set count=100, and leave samples of the data out of the run (data.subset, data.shots)"
        )
    weight, added = problem.root_weight[:, 0].square(), torch.zeros(0, dtype=torch.int64)
    weight[pool] = 0.0
    now = first = derivative(DualFactor(problem.with_(weight=weight), kernel, scales))
    losses = [now.loss]
    while len(added) < min(count, len(pool)):
        left = pool[~torch.isin(pool, added.to(pool))]
        ranked = left[now.gradient[left].argsort(stable=True)][: min(batch, count - len(added))]
        chosen = ranked[now.gradient[ranked] < 0]
        if len(chosen) == 0:
            break
        weight = weight.index_fill(0, chosen, 1.0)
        now = derivative(DualFactor(problem.with_(weight=weight), kernel, scales))
        if now.loss > losses[-1]:
            break
        added = torch.cat([added, chosen.cpu()])
        losses.append(now.loss)
    return Extension(added, losses, first.gradient)


def detrimental(gradient: Tensor, *, threshold: float | None = None, share: float | None = None) -> Tensor:
    """Find the samples whose weight raises the held-out loss.

    Args:
        gradient: Derivative of the loss in the weights (n,).
        threshold: Derivative from which a sample is detrimental; None means above 0.
        share: Instead, the share of the samples with the largest derivatives, whatever their sign: a ridge that is
            stronger than best lowers them all.

    Returns:
        Positions, the most detrimental first.

    Raises:
        ValueError: Both are given, or the share is out of range.

    Example:
        >>> import torch
        >>> detrimental(torch.tensor([-1.0, 0.5, 2.0, -3.0])).tolist()
        [2, 1]
        >>> detrimental(torch.tensor([-1.0, 0.5, 2.0, -3.0]), share=0.25).tolist()
        [2]
    """
    if threshold is not None and share is not None:
        raise ValueError(f"got threshold={threshold} and share={share}, expected one of them. Set share=null")
    if share is not None and not 0 < share <= 1:
        raise ValueError(f"`share` must be above 0 and at most 1, got {share}. Set share=0.1")
    ranked = gradient.argsort(descending=True, stable=True)
    if share is not None:
        return ranked[: max(1, round(share * len(ranked)))]
    found = gradient[ranked]
    return ranked[found > 0 if threshold is None else found >= threshold]
