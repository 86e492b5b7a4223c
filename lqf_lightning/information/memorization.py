"""What models know of a sample only because they have seen it, from many models trained on random subsets."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

LEAST_RUNS = 200  # below, a threshold of 0.25 is within three standard errors of nothing


@dataclass(frozen=True)
class Memorization:
    """Memorization per sample, with its noise.

    Attributes:
        memorization: P[right | trained on it] - P[right | not] (N,); NaN where one of the two was never the case.
        standard_error: Of it, from the spread of the runs (N,); 0 where all agree, NaN with less than two runs each.
        worst_standard_error: The largest that such numbers of runs can have (N,), see `worst_standard_error`.
        seen: Mean correctness of the runs that were trained on the sample (N,).
        c_score: Mean correctness of those that were not (N,): the C-score at the ratio of the subsets.
        runs_in: How many were (N,).
        runs_out: How many were not (N,).
    """

    memorization: Tensor
    standard_error: Tensor
    worst_standard_error: Tensor
    seen: Tensor
    c_score: Tensor
    runs_in: Tensor
    runs_out: Tensor


@dataclass(frozen=True)
class Influence:
    """What training on each sample did to the predictions on some others.

    Attributes:
        rows: Which of the others (start and end).
        influence: P[other right | trained on the sample] - P[.. | not] (B, N).
        standard_error: Of it, from the spread of the runs (B, N).
    """

    rows: slice
    influence: Tensor
    standard_error: Tensor


def memorization(mask: Tensor, correct: Tensor) -> Memorization:
    r"""Compare the models that were trained on a sample with those that were not (Feldman and Zhang 2020).

    .. math:: mem_i = \frac{\sum_t m_{ti} c_{ti}}{\sum_t m_{ti}} - \frac{\sum_t (1 - m_{ti}) c_{ti}}{\sum_t (1-m_{ti})}

    Args:
        mask: m, whether run t was trained on sample i (T, N), bool.
        correct: c, whether it gets the sample right (T, N), or with which probability.

    Returns:
        See there.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
        >>> correct = torch.tensor([[1.0, 1.0], [1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])
        >>> found = memorization(mask, correct)
        >>> found.memorization.tolist(), found.c_score.tolist()
        ([0.5, 0.0], [0.5, 1.0])
    """
    if mask.shape != correct.shape:
        raise ValueError(f"masks are {tuple(mask.shape)} and answers {tuple(correct.shape)}, expected (T, N) for both")
    answer = _numbers(correct)
    member = mask.to(answer)
    runs_in = member.sum(0).double()
    runs_out = len(mask) - runs_in
    square = answer.square()
    inside, spread_in = _moments((member * answer).sum(0), (member * square).sum(0), runs_in)
    member = 1 - member
    outside, spread_out = _moments((member * answer).sum(0), (member * square).sum(0), runs_out)
    worst = 0.5 * (1 / runs_in + 1 / runs_out).sqrt()
    error = (spread_in + spread_out).sqrt()
    return Memorization(inside - outside, error, worst, inside, outside, runs_in.long(), runs_out.long())


def influence(mask: Tensor, correct: Tensor, block: int = 256) -> Iterator[Influence]:
    r"""The same for other samples: which training samples decide whether they are right.

    .. math:: infl_{ji} = \frac{\sum_t v_{tj} m_{ti}}{\sum_t m_{ti}}
        - \frac{\sum_t v_{tj} (1 - m_{ti})}{\sum_t (1 - m_{ti})}

    The whole matrix of a large set does not fit in memory, so it comes in blocks.

    Args:
        mask: m, whether run t was trained on sample i (T, N), bool.
        correct: v, whether it gets the other sample j right (T, M), or with which probability.
        block: Other samples at a time, B.

    Yields:
        Blocks of at most B other samples, in order.

    Raises:
        ValueError: The numbers of runs differ.

    Example:
        >>> import torch
        >>> mask = torch.tensor([[True, False], [True, True], [False, True], [False, False]])
        >>> (found,) = influence(mask, torch.tensor([[1.0], [1.0], [0.0], [0.0]]))
        >>> found.influence.tolist()
        [[1.0, 0.0]]
    """
    if len(mask) != len(correct):
        raise ValueError(f"masks of {len(mask)} runs and answers of {len(correct)}, expected as many")
    member = mask.to(_numbers(correct[:, :0]))
    runs_in = member.sum(0).double()
    runs_out = len(mask) - runs_in
    for start in range(0, correct.shape[1], block):
        rows = slice(start, min(start + block, correct.shape[1]))
        answer = _numbers(correct[:, rows]).T
        square = answer.square()
        first, second = answer @ member, square @ member
        inside, spread_in = _moments(first, second, runs_in)
        whole, whole_square = answer.sum(1, keepdim=True), square.sum(1, keepdim=True)
        outside, spread_out = _moments(whole - first, whole_square - second, runs_out)
        yield Influence(rows, inside - outside, (spread_in + spread_out).sqrt())


def worst_standard_error(runs: int, ratio: float) -> float:
    r"""The largest standard error of memorization and influence, :math:`\frac12 \sqrt{1/(pT) + 1/((1-p)T)}`.

    Args:
        runs: T.
        ratio: Share p of the samples that each run is trained on.

    Returns:
        The standard error.

    Raises:
        ValueError: There is no run, or the ratio is not between 0 and 1.

    Example:
        >>> round(worst_standard_error(200, 0.7), 3)
        0.077
    """
    if runs < 1 or not 0 < ratio < 1:
        raise ValueError(f"expected at least 1 run and a ratio between 0 and 1, got {runs} and {ratio}")
    return 0.5 * math.sqrt(1 / (ratio * runs) + 1 / ((1 - ratio) * runs))


def refuse_threshold(runs: int, ratio: float, threshold: float) -> None:
    """Refuse to tell memorized samples from others by a threshold that noise alone passes.

    Args:
        runs: Number of runs T.
        ratio: Share of the samples that each run is trained on.
        threshold: Memorization or influence from which samples would be listed.

    Raises:
        ValueError: There are less than 200 runs.
    """
    if runs < LEAST_RUNS:
        error = worst_standard_error(runs, ratio)
        raise ValueError(
            f"{runs} runs estimate memorization with a standard error of up to {error:.2f}, so that a threshold of "
            f"{threshold:g} lists noise: {LEAST_RUNS} runs are needed. Train more of them, "
            f"'data.subset_seed=range({LEAST_RUNS})', or set threshold=null and rank the samples"
        )


def _numbers(values: Tensor) -> Tensor:
    # Single precision adds zeros and ones exactly, up to 16 million of them; probabilities need more.
    return values.double() if values.is_floating_point() else values.float()


def _moments(total: Tensor, squares: Tensor, runs: Tensor) -> tuple[Tensor, Tensor]:
    # Mean, and the unbiased estimate of its variance; rounding shall not make the latter negative, nor a sum of nothing
    # anything but undefined.
    mean = (total.double() / runs).masked_fill(runs == 0, torch.nan)
    return mean, (squares.double() / runs - mean.square()).clamp_min(0) / (runs - 1)
