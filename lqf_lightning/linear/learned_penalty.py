"""The penalty that held-out predictions ask for: one weight per layer group, and the ridge."""

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.linear.held_out_gradient import HeldOutCriterion, judged_weight
from lqf_lightning.linear.held_out_sets import HeldOutSets
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.penalty_objective import PenaltyObjective, PenaltyStep
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.quasi_newton import QuasiNewton

_RIDGE = 0.1  # of the mean diagonal, at the start
_OTHER_RIDGES = (0.01, 1.0, 1e-4)  # if predictions do not beat guessing there, where the loss is flat
_ENOUGH = 3e-4  # nats per sample


@dataclass(frozen=True)
class LearnedPenalty:
    r"""Penalty weights by layer group, and how they were found.

    The penalty is :math:`\frac\lambda2 \sum_g s_g^{-1} dw_g^T M_g\,dw_g`; the kernel that goes with it is
    :math:`\sum_g s_g K_g`.

    Attributes:
        scales: s_g, inverse penalty weights by group of the kernel, so normalized that the mean diagonal of the kernel
            stays, :math:`\sum_g s_g d_g = \sum_g d_g`. 1 for groups without a part in the outputs.
        ridge: lambda of the sum form.
        relative_ridge: The same in terms of the mean diagonal of the weighted kernel.
        temperature: By which held-out predictions were divided; infinite if no penalty tried beats guessing, 1 for
            "press".
        loss: Held-out loss by step (steps,): nats per sample, or the mean squared residual; infinite where the system
            could not be factored.
        accuracy: Held-out accuracy by step (steps,); nan for a single output.
        share: Part of the kernel's diagonal that each group has, :math:`s_g d_g / \sum_h s_h d_h`.
        step: The step that was kept.
    """

    scales: dict[str, float]
    ridge: float
    relative_ridge: float
    temperature: float
    loss: Tensor
    accuracy: Tensor
    share: dict[str, float]
    step: int


def expected_penalty(
    problem: QuadraticProblem, kernel: Kernel, expected: Mapping[str, float] | None = None
) -> LearnedPenalty:
    """The penalty that `learn_penalty` starts from, where there is nothing to learn it by.

    Args:
        problem: What is minimized; its ridge plays no part.
        kernel: Inner products among the training samples by group.
        expected: As in `learn_penalty`.

    Returns:
        The penalty, with the parts of the trace that are expected and a ridge of a tenth of the mean diagonal; one
        step, whose loss and accuracy are nan.
    """
    every = torch.ones(problem.samples, dtype=torch.bool)
    objective = PenaltyObjective(problem, kernel, "press", every, None, expected)
    unknown = torch.tensor([math.nan], dtype=torch.float64)
    return _at(objective, objective.before(_RIDGE), unknown, unknown, 0, math.nan)


def learn_penalty(
    problem: QuadraticProblem,
    kernel: Kernel,
    *,
    criterion: HeldOutCriterion = "cross_entropy",
    start: LearnedPenalty | None = None,
    steps: int = 80,
    judged: Tensor | None = None,
    together: Tensor | None = None,
    expected: Mapping[str, float] | None = None,
    least_ridge: float = 0.0,
    watch: Callable[[Any], Iterable[Any]] = iter,
) -> LearnedPenalty:
    r"""Choose scales and ridge by exact leave-one-out, without validation data.

    Minimized is the `PenaltyObjective`: the held-out loss, and a weak prior that groups have the traces expected. The
    search starts from these and a ridge of a tenth of the mean diagonal, moves no logarithm by more than 12, and ends
    when two steps in a row gain less than 3e-4 nats, usually after 8 to 20 evaluations. No chance is involved: every
    process that has the same kernel finds the same penalty, up to the rounding of its hardware.

    For "cross_entropy" samples that are the only ones of their class (outside their set) are fitted but not judged,
    since no penalty could predict them.

    Args:
        problem: What is minimized; its ridge plays no part.
        kernel: Inner products among the training samples by group, of any form.
        criterion: "cross_entropy" or "press", see `held_out_gradient`.
        start: Where to start instead, for instance what the trace kernel gave; it has all groups of the kernel.
        steps: Most evaluations.
        judged: Samples whose held-out prediction counts (n,), bool; the others take part in the fit alone, as they must
            if the starting weights have seen their labels. None means all.
        together: Number by sample (n,), int64: samples with the same number are left out at once, as copies of one
            image must be. None: each alone.
        expected: Part of the kernel's trace that each group is expected to have; None: all alike.
        least_ridge: Smallest ridge to look at, in terms of the mean diagonal of the kernel. Iterative solvers need
            fewer steps with a larger one.
        watch: Wraps the steps, for a progress bar.

    Returns:
        The best step. If no step beats guessing, the start, with an infinite temperature.

    Raises:
        ValueError: There are fewer than two samples to judge, or one class only, or no class with a second sample; the
            kernel is zero or not finite; the start lacks a group; or there is no step. Refusals of `held_out_gradient`
            apply too.

    Example:
        >>> import torch
        >>> x, z = torch.linspace(-1, 1, 32)[:, None], torch.cos(torch.arange(32.0).outer(torch.arange(1.0, 20.0)))
        >>> kernel = Kernel({"x": (x @ x.T)[None], "z": (z @ z.T)[None]}, outputs=1)
        >>> problem = QuadraticProblem(torch.zeros(32, 1), x + 0.3 * torch.cos(9 * x), ridge=1.0)
        >>> result = learn_penalty(problem, kernel, criterion="press")
        >>> round(result.share["x"], 1)  # before learning it is 0.5
        0.7
    """
    if steps < 1:
        raise ValueError(f"expected at least one step, got {steps}")
    HeldOutSets.of(problem, kernel, together)  # refuses numbers that do not fit
    judged = _judgeable(problem, criterion, judged, together)
    objective = PenaltyObjective(problem, kernel, criterion, judged, together, expected, least_ridge)
    middle = objective.before(_RIDGE)
    first = middle if start is None else objective.position(start.scales, start.ridge)
    search, found = QuasiNewton(first, tolerance=_ENOUGH, center=middle), list[PenaltyStep]()
    others = [objective.before(ridge) for ridge in _OTHER_RIDGES]
    begun = False
    for _ in watch(range(steps)):
        found.append(objective(search.point))
        begun = begun or found[-1].informative
        if begun and not search.tell(found[-1].value, found[-1].gradient):
            break
        if not begun and not others:
            break
        if not begun:
            search = QuasiNewton(others.pop(0), tolerance=_ENOUGH, center=middle)
    return _outcome(objective, found)


def _outcome(objective: PenaltyObjective, steps: list[PenaltyStep]) -> LearnedPenalty:
    kept = min(range(len(steps)), key=lambda i: steps[i].value)
    best, results = steps[kept], [one.result for one in steps]
    chosen = best.result
    if chosen is None:
        raise ValueError(
            "the kernel has negative eigenvalues beyond the ridge at which the search starts, a tenth of its mean "
            "diagonal. Assemble it in double precision (trainer.precision=64-true)"
        )
    losses = torch.tensor([math.inf if one is None else one.loss for one in results], dtype=torch.float64)
    accuracies = torch.tensor([math.nan if one is None else one.accuracy for one in results], dtype=torch.float64)
    return _at(objective, best.point, losses, accuracies, kept, chosen.temperature)


def _at(
    objective: PenaltyObjective, point: Tensor, loss: Tensor, accuracy: Tensor, step: int, temperature: float
) -> LearnedPenalty:
    total, share = float(point.exp().sum()), point.softmax(0).tolist()
    whole, names = sum(objective.means.values()), objective.kernel.groups
    scales = dict.fromkeys(names, 1.0)
    scales |= {name: part * whole / mean for (name, mean), part in zip(objective.means.items(), share, strict=True)}
    return LearnedPenalty(
        scales=scales,
        ridge=whole / total,
        relative_ridge=1 / total,
        temperature=temperature,
        loss=loss,
        accuracy=accuracy,
        share=dict.fromkeys(names, 0.0) | dict(zip(objective.means, share, strict=True)),
        step=step,
    )


def _judgeable(
    problem: QuadraticProblem, criterion: HeldOutCriterion, judged: Tensor | None, together: Tensor | None
) -> Tensor:
    present = problem.root_weight[:, 0] > 0
    judged = judged_weight(problem, judged) > 0
    if criterion == "cross_entropy" and problem.outputs > 1:
        classes = problem.target.argmax(1)
        number = len(torch.unique(classes[judged]))
        if number < 2:
            raise ValueError(
                f"the {int(judged.sum())} samples to judge have {number} classes, expected two "
                "at least: their cross-entropy says nothing. Set method.metric=identity, with a ridge of your own"
            )
        sets = torch.arange(problem.samples, device=present.device) if together is None else together.to(present.device)
        judged = judged & _accompanied(classes, sets, present)
    if int(judged.sum()) < 2:
        raise ValueError(
            f"{int(judged.sum())} samples can be judged, expected two at least: a class needs a second sample that "
            "stays when the first is left out. Set method.metric=identity, with a ridge of your own"
        )
    return judged


def _accompanied(classes: Tensor, sets: Tensor, present: Tensor) -> Tensor:
    # Whether another set has samples of the same class.
    pairs, own = torch.unique(torch.stack([classes[present], sets[present]]), dim=1, return_inverse=True)
    result = torch.zeros_like(present)
    result[present] = (pairs[0].bincount() > 1)[pairs[0][own]]
    return result
