"""Memorization of a linear-quadratic problem, with every subset model solved exactly instead of trained."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lqf_lightning.linear import DualFactor, Kernel, LeaveOneOut, QuadraticProblem


@dataclass(frozen=True)
class SubsetModels:
    """Which samples the models of all subsets get right.

    Attributes:
        correct: Of the training samples, whether in the subset or not (T, n), bool.
        correct_other: Of the other samples (T, m), bool; None if there are none.
    """

    correct: Tensor
    correct_other: Tensor | None = None


@dataclass(frozen=True)
class OtherSamples:
    """Samples that no model is trained on.

    Attributes:
        cross: Kernel with their rows and the columns of all training samples.
        initial: Their outputs before training (m, C).
        label: Their class positions (m,).
    """

    cross: Kernel
    initial: Tensor
    label: Tensor


def subset_memorization(
    problem: QuadraticProblem,
    kernel: Kernel,
    label: Tensor,
    mask: Tensor,
    *,
    scales: Mapping[str, float] | None = None,
    others: OtherSamples | None = None,
    ridge: Literal["mean", "sum"] = "mean",
) -> SubsetModels:
    r"""Solve the problem on each subset S from the block :math:`K_{SS}` of one kernel, and ask it about all samples.

    With `memorization` and `influence` this is what so many training runs would estimate, without one of them: a
    factorization of the block each. Its limit for subsets of all samples but one is `leave_one_out_memorization`.

    Args:
        problem: The problem on all training samples.
        kernel: Inner products among them.
        label: Class positions of the training samples (n,).
        mask: Which samples each model is trained on (T, n), bool, at least one each.
        scales: Inverse penalty weights by layer group, see `Kernel.total`.
        others: Other samples to be asked about.
        ridge: "mean" keeps `method.ridge`, so that lambda shrinks with the subset as it does in training; "sum" keeps
            lambda, as leave-one-out does.

    Returns:
        Their answers. Refusals are those of `DualFactor`.

    Raises:
        ValueError: The masks do not fit the problem, or one is empty.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 2), torch.eye(2), ridge=0.1)
        >>> kernel = Kernel({"all": torch.eye(2)[None]}, outputs=2, form="trace")
        >>> subset_memorization(problem, kernel, torch.arange(2), torch.tensor([[True, False]])).correct.tolist()
        [[True, False]]
    """
    if mask.ndim != 2 or mask.shape[1] != problem.samples or not bool(mask.any(1).all()):
        raise ValueError(
            f"expected masks (T, {problem.samples}) with at least one sample each, got {tuple(mask.shape)} with "
            f"{int((~mask.any(-1)).sum())} empty ones"
        )
    whole = _merged(kernel, scales)
    cross = None if others is None else _merged(others.cross, scales)
    correct, correct_other = [], []
    for factor, rows in _subset_factors(problem, whole, mask, ridge):
        answer = factor.predict(_part(whole, torch.arange(problem.samples), rows), problem.initial)
        correct.append(answer.argmax(1) == label)
        if others is not None and cross is not None:
            answer = factor.predict(_part(cross, torch.arange(len(others.initial)), rows), others.initial)
            correct_other.append(answer.argmax(1) == others.label)
    return SubsetModels(torch.stack(correct), torch.stack(correct_other) if correct_other else None)


def leave_one_out_memorization(outputs: Tensor, result: LeaveOneOut, label: Tensor) -> Tensor:
    r"""Whether a sample is right with itself in the training set, minus whether it is without.

    The limit of :math:`mem_i` for subsets of all other samples: no longer a probability, since there is one such model.

    Args:
        outputs: Outputs of the optimum on the training samples (n, C), as of `DualFactor.solution`.
        result: As of `leave_one_out`.
        label: Class positions (n,).

    Returns:
        1, 0, or -1 (n,), int64.

    Raises:
        ValueError: The numbers of samples differ.
    """
    if not len(outputs) == len(result.prediction) == len(label):
        raise ValueError(f"got {len(outputs)} outputs, {len(result.prediction)} predictions and {len(label)} labels")
    return (outputs.argmax(1) == label).long() - (result.prediction.argmax(1) == label).long()


def _subset_factors(
    problem: QuadraticProblem, kernel: Kernel, mask: Tensor, ridge: str
) -> Iterator[tuple[DualFactor, Tensor]]:
    for chosen in mask:
        rows = chosen.nonzero().squeeze(1)
        parts = {name: getattr(problem, name) for name in ("initial", "target", "weight", "linear")}
        strength = problem.ridge * (len(rows) / problem.samples if ridge == "mean" else 1.0)
        smaller = {name: None if entry is None else entry[rows] for name, entry in parts.items()}
        yield DualFactor(problem.with_(ridge=strength, **smaller), _part(kernel, rows, rows)), rows


def _merged(kernel: Kernel, scales: Mapping[str, float] | None) -> Kernel:
    return Kernel({"all": kernel.total(scales)}, kernel.outputs, kernel.form)


def _part(kernel: Kernel, rows: Tensor, columns: Tensor) -> Kernel:
    # Rows are ordered by sample, then by output.
    def spread(samples: Tensor) -> Tensor:
        coupled = torch.arange(kernel.coupled)
        return (samples.cpu().unsqueeze(1) * kernel.coupled + coupled).flatten()

    first, second = spread(rows), spread(columns)
    groups = {
        name: group[:, first.to(group.device)][:, :, second.to(group.device)] for name, group in kernel.groups.items()
    }
    return Kernel(groups, kernel.outputs, kernel.form)
