"""How good held-out predictions are, and how that changes with the penalty weights: both from one inverse."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from lqf_lightning.linear.held_out import held_out_accuracy, held_out_cross_entropy, held_out_press
from lqf_lightning.linear.held_out_sets import HeldOutSets
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem

HeldOutCriterion = Literal["cross_entropy", "press"]

_CHUNK = 2**24  # numbers of the gradient that are held at a time, 128 MiB


class IndefiniteKernelError(ValueError):
    """The kernel has a negative eigenvalue that the ridge does not make up for."""


@dataclass(frozen=True)
class HeldOutGradient:
    r"""A held-out loss and its derivatives.

    Scales and ridge times the same factor are the same model, so that the derivatives by their logarithms sum to 0.

    Attributes:
        loss: Nats per sample at the best temperature, or mean squared residual.
        accuracy: Share of held-out predictions that are right; nan for a single output.
        temperature: By which predictions are divided; infinite if none beats guessing, 1 for "press".
        prediction: :math:`f_{-S(i)}(x_i)` (n, C); nan for samples of weight 0, which no model has seen.
        by_scale: Derivative of the loss by :math:`\log s_g`, by group of the kernel; 0 for frozen groups.
        by_ridge: Derivative by :math:`\log \lambda`.
    """

    loss: float
    accuracy: float
    temperature: float
    prediction: Tensor = field(repr=False)
    by_scale: dict[str, float]
    by_ridge: float


def held_out_gradient(
    problem: QuadraticProblem,
    kernel: Kernel,
    scales: Mapping[str, float] | None = None,
    *,
    criterion: HeldOutCriterion = "cross_entropy",
    judged: Tensor | None = None,
    together: Tensor | None = None,
) -> HeldOutGradient:
    r"""Predict every sample without itself, judge, and differentiate by the penalty, without refits or autograd.

    Let :math:`S = A^{1/2} (\sum_g s_g K_g) A^{1/2} + \lambda I`, G its inverse (with an intercept the top left block of
    the bordered inverse, so that held-out models fit it anew) and :math:`\gamma = G A^{1/2} (y - f_0)`. Without the
    samples of a set the residuals on it are :math:`A_S^{-1/2} t_S`, :math:`t_S = G_{SS}^{-1} \gamma_S`. With
    :math:`\tau` the derivative of the loss by t and :math:`u_S = G_{SS}^{-1} \tau_S`,

    .. math:: \frac{\partial L}{\partial S} = G D G - (G u) \gamma^T, \qquad D = \mathrm{diag}_S(u_S t_S^T).

    For N rows this takes an inverse (N^3) and, if outputs share matrices, one product (2 N^3); two matrices in double
    precision are held. The temperature of the cross-entropy is the best one, so that it has no part in the derivative.

    Args:
        problem: What is minimized; its ridge is lambda.
        kernel: Inner products among the training samples, of any form.
        scales: Inverse penalty weights s_g, see `Kernel.total`.
        criterion: "cross_entropy" of predictions at their best temperature, the right class being that of the largest
            target; or "press", the mean over samples of the squared residual, summed over outputs.
        judged: Samples whose prediction counts (n,), bool; None means all. Means are by sample weight.
        together: Number by sample (n,), int64: samples with the same number are left out at once. None: each alone.

    Returns:
        See there. Refused are linear terms, problems without a judged sample, sets that hold all samples that an
        intercept needs, and what `bordered_inverse` refuses.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), ridge=1.0)
        >>> result = held_out_gradient(problem, Kernel({"all": torch.ones(1, 2, 2)}, outputs=1), criterion="press")
        >>> round(result.loss, 9)  # s = 1 predicts s / (s + 1) of the other sample: ((1 - 1.5)^2 + (3 - 0.5)^2) / 2
        3.25
        >>> round(result.by_scale["all"], 9)  # d/ds at s = 1 of ((1 - 3 s/(s+1))^2 + (3 - s/(s+1))^2) / 2
        -0.25
    """
    weight = judged_weight(problem, judged)
    sets = HeldOutSets.of(problem, kernel, together)
    scales = dict.fromkeys(kernel.groups, 1.0) if scales is None else scales
    root = problem.root_weight.repeat_interleave(kernel.coupled, 0).to(next(iter(kernel.groups.values())).device)
    inverse = bordered_inverse(problem, kernel, scales)
    solved = inverse @ (root * kernel.split(problem.residual.to(root)))
    safe = torch.where(root > 0, root, 1.0)
    factors = sets.factor(inverse)
    driving = sets.solve(factors, solved)
    prediction = problem.target.to(root) - kernel.join(driving / safe)
    judgement = _judge(prediction, problem.target.to(root), weight.to(root), criterion)
    pull = sets.solve(factors, kernel.split(-judgement.slope) / safe)
    by_scale = dict.fromkeys(kernel.groups, 0.0)
    step = max(1, _CHUNK // len(root))
    for block, matrix in enumerate(inverse):
        product, left = sets.sandwich(matrix, pull[block], driving[block]), matrix @ pull[block]
        for start in range(0, len(root), step):
            rows = slice(start, start + step)
            change = product(rows).addmm_(left[rows], solved[block].T, alpha=-1).mul_(root[rows]).mul_(root.T)
            for name, scale in scales.items():
                if scale > 0:
                    by_scale[name] += scale * float((kernel.groups[name][block, rows] * change).sum())
    prediction[root[:: kernel.coupled, 0] == 0] = math.nan
    loss, accuracy, temperature = judgement.loss, judgement.accuracy, judgement.temperature
    return HeldOutGradient(loss, accuracy, temperature, prediction, by_scale, -sum(by_scale.values()))


def bordered_inverse(problem: QuadraticProblem, kernel: Kernel, scales: Mapping[str, float] | None = None) -> Tensor:
    r"""Invert the dual system, holding two matrices at most.

    Args:
        problem: What is minimized.
        kernel: Inner products among the training samples.
        scales: Inverse penalty weights, see `Kernel.total`.

    Returns:
        G (b, N, N): :math:`S^{-1}`, or with an intercept the top left block of the bordered inverse.

    Raises:
        ValueError: Shapes do not fit.
        IndefiniteKernelError: The system is not positive definite.
    """
    size = problem.samples * kernel.coupled
    odd = [name for name, group in kernel.groups.items() if group.shape != (kernel.blocks, size, size)]
    if kernel.outputs != problem.outputs or odd:
        raise ValueError(
            f"expected a kernel of {problem.samples} training samples with {problem.outputs} outputs, matrices "
            f"{(kernel.blocks, size, size)}; got {kernel.outputs} outputs and odd groups {odd[:3]}"
        )
    system = kernel.total(scales)
    root = problem.root_weight.repeat_interleave(kernel.coupled, 0).to(system)
    system.mul_(root).mul_(root.T).diagonal(dim1=1, dim2=2).add_(problem.ridge)
    lower, info = torch.linalg.cholesky_ex(system)
    if bool(info.any()):
        raise IndefiniteKernelError(
            f"the kernel has an eigenvalue below {-problem.ridge:.3g}, its mean diagonal is "
            f"{float(system.diagonal(dim1=1, dim2=2).mean()):.3g}: rounding in its assembly exceeds the ridge. "
            "Assemble it in double precision (trainer.precision=64-true)"
        )
    del system
    inverse: Tensor = torch.cholesky_inverse(lower)
    if problem.intercept:
        columns = root * torch.eye(kernel.coupled).to(root).repeat(problem.samples, 1)
        half = torch.cholesky_solve(columns.expand(len(lower), -1, -1), lower)
        inverse.baddbmm_(half, torch.linalg.solve(columns.T @ half, half.mT), alpha=-1)
    return inverse


@dataclass(frozen=True)
class _Judgement:
    loss: float
    accuracy: float
    temperature: float
    slope: Tensor  # derivative of the loss by every prediction (n, C)


def _judge(prediction: Tensor, target: Tensor, weight: Tensor, criterion: HeldOutCriterion) -> _Judgement:
    rows = weight > 0
    found, wanted, share = prediction[rows], target[rows], weight[rows] / weight.sum()
    accuracy = math.nan if wanted.shape[1] < 2 else float(held_out_accuracy(found, wanted, share))
    slope = torch.zeros_like(prediction)
    if criterion == "press":
        slope[rows] = 2 * share.unsqueeze(1) * (found - wanted)
        return _Judgement(float(held_out_press(found, wanted, share)), accuracy, 1.0, slope)
    loss, temperature = held_out_cross_entropy(found, wanted, share)
    ideal = F.one_hot(wanted.argmax(1), wanted.shape[1])
    slope[rows] = share.unsqueeze(1) * (torch.softmax(found / temperature, 1) - ideal) / temperature
    return _Judgement(float(loss), accuracy, float(temperature), slope)


def judged_weight(problem: QuadraticProblem, judged: Tensor | None) -> Tensor:
    """The part of every sample in the judgement.

    Args:
        problem: The problem.
        judged: As in `held_out_gradient`.

    Returns:
        Its weight, or 0 if it is not judged (n,).

    Raises:
        ValueError: The problem has linear terms, the shape or type is another, or no sample of positive weight is left.
    """
    if bool(problem.linear_terms.any()):
        raise ValueError("held-out derivatives are those of problems without linear terms; leave `linear` out")
    weight = problem.root_weight[:, 0].square()
    if judged is None:
        return weight
    if judged.shape != weight.shape or judged.dtype != torch.bool:
        raise ValueError(f"`judged` must be bool ({len(weight)},), got {judged.dtype} {tuple(judged.shape)}")
    if not bool((judged.to(weight.device) & (weight > 0)).any()):
        raise ValueError("no sample is judged: all are excluded or have weight 0, expected one at least")
    return weight * judged.to(weight)
