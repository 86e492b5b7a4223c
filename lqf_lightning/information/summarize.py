"""A smaller training set that does nearly as well: samples leave, those that tell least first."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from lqf_lightning.information.unique_information import function_information, weight_information
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.held_out import held_out_accuracy
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.restrict import restrict_kernel, restrict_problem

RemovalOrder = Literal["iterative", "one_shot", "random"]


@dataclass(frozen=True)
class Judged:
    """Held-out samples that decide how good a subset is, and whose outputs unique information is about.

    Attributes:
        cross: Kernel with their rows and the columns of the training samples.
        initial: Their outputs before training (m, C).
        target: Their targets (m, C), largest at the right class.
    """

    cross: Kernel
    initial: Tensor
    target: Tensor


@dataclass(frozen=True)
class Summary:
    """Nested subsets, from all samples down to few.

    Attributes:
        order: Positions of the training samples (n,), the first to leave first: the r best are ``order[n - r:]``.
        kept: Sizes of the subsets that were looked at (k,), the largest first.
        accuracy: Accuracy of the optimum on each (k,), on the held-out samples; where there are none, that of
            leave-one-out among those that are left, which flatters small subsets.
        score: What decided (n,): the score of each sample in the round in which it left, in nats.
    """

    order: Tensor
    kept: Tensor
    accuracy: Tensor
    score: Tensor

    def best(self, count: int) -> Tensor:
        """The subset of a size.

        Args:
            count: Samples to keep, at least 1.

        Returns:
            Positions in increasing order.
        """
        return self.order[len(self.order) - count :].sort().values


def summarize(
    problem: QuadraticProblem,
    kernel: Kernel,
    judged: Judged | None = None,
    scales: Mapping[str, float] | None = None,
    *,
    order: RemovalOrder = "iterative",
    share: float = 0.05,
    least: int = 1,
    seed: int = 0,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
) -> Summary:
    """Remove the samples of the lowest unique information (Harutyunyan et al., ICLR 2021, section 5).

    Two copies of an image tell nothing that the other does not, while the last of them may tell much: unique
    information does not add up. So every round removes the lowest share of what is left and scores the rest anew,
    each by one factorization of its part of the kernel. The ridge of the sum form stays what it is.

    Nothing tells more than a wrong label, which therefore stays: take wrong labels out before (`label_suspects`,
    `detrimental`), or summaries are worse than chance.

    Args:
        problem: The problem of all training samples.
        kernel: Inner products among them.
        judged: Held-out samples; None: unique information is that in the weights.
        scales: Inverse penalty weights by layer group.
        order: "iterative", or what it is compared with: "one_shot" (scores of the full set decide) or "random".
        share: Of the samples that are left, removed in each round.
        least: Samples at which to stop; a class is never left without any.
        seed: Decides "random".
        watch: Wraps the numbers of the rounds, to report progress.

    Returns:
        Nested subsets and how good they are.

    Raises:
        ValueError: `order` has another name, or `share` or `least` is out of range.
    """
    if order not in ("iterative", "one_shot", "random"):
        raise ValueError(f"`order` must be iterative, one_shot or random, got {order!r}. Set order=iterative")
    if not 0 < share < 1 or not 1 <= least <= problem.samples:
        raise ValueError(
            f"`share` must be between 0 and 1 and `least` between 1 and {problem.samples}, got {share} and {least}. "
            "Set share=0.05"
        )
    label = problem.target.argmax(1)
    sizes = _sizes(problem.samples, share, max(least, len(set(label.tolist()))))
    left, removed = torch.arange(problem.samples), []
    scores = torch.zeros(problem.samples, dtype=torch.float64)
    fixed = torch.rand(problem.samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    accuracy = []
    for number in watch(range(len(sizes))):
        factor, cross = _part(problem, kernel, judged, scales, left)
        accuracy.append(_accuracy(factor, cross, judged))
        if order == "iterative" or number == 0:
            scores[left] = unique_information(factor, cross).to(scores)
        fixed = scores.clone() if order == "one_shot" and number == 0 else fixed
        if number + 1 < len(sizes):
            leaving = _lowest(scores[left] if order == "iterative" else fixed[left], label.to(left)[left],
                              len(left) - sizes[number + 1])  # fmt: skip
            removed.append(left[leaving])
            left = left[~torch.isin(left, left[leaving])]
    ranked = left[(scores if order == "iterative" else fixed)[left].argsort(stable=True)]
    return Summary(torch.cat([*removed, ranked]), torch.tensor(sizes), torch.tensor(accuracy), scores)


def unique_information(factor: DualFactor, cross: Kernel | None = None) -> Tensor:
    """Score samples: in the outputs on other samples where there are some, else in the weights.

    Args:
        factor: The solved problem.
        cross: Kernel with the rows of the other samples.

    Returns:
        Nats (n,), under noise of variance 1.
    """
    result = leave_one_out(factor, cross)
    if result.function_change is None:
        return weight_information(result.weight_change)
    return function_information(result.function_change)


def _sizes(samples: int, share: float, least: int) -> list[int]:
    sizes = [samples]
    while sizes[-1] > least:
        sizes.append(max(least, sizes[-1] - max(1, round(share * sizes[-1]))))
    return sizes


def _part(
    problem: QuadraticProblem, kernel: Kernel, judged: Judged | None, scales: Mapping[str, float] | None, left: Tensor
) -> tuple[DualFactor, Kernel | None]:
    own = left.to(problem.initial.device)
    inner = restrict_kernel(kernel, rows=own, columns=own)
    factor = DualFactor(restrict_problem(problem, own), inner, scales)
    return factor, None if judged is None else restrict_kernel(judged.cross, columns=own)


def _accuracy(factor: DualFactor, cross: Kernel | None, judged: Judged | None) -> float:
    if judged is None or cross is None:
        return float(held_out_accuracy(leave_one_out(factor).prediction, factor.problem.target))
    return float(held_out_accuracy(factor.predict(cross, judged.initial), judged.target))


def _lowest(score: Tensor, label: Tensor, count: int) -> Tensor:
    # The best of each class stays.
    ranked = score.argsort(stable=True)
    last = {int(label[position]): int(position) for position in ranked}
    free = ranked[~torch.isin(ranked, torch.tensor(list(last.values())))]
    return free[:count]
