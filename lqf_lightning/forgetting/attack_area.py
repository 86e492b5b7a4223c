"""How well a score tells two groups apart: the area under its receiver operating curve, and the error of it."""

import torch
from torch import Tensor


def attack_area(positive: Tensor, negative: Tensor) -> tuple[float, float]:
    r"""Probability that a positive sample scores higher than a negative one, ties counting one half.

    The standard error is that of DeLong et al. (1988): with :math:`V_i` the share of the negatives below positive i and
    :math:`W_j` the share of the positives above negative j, its square is :math:`var(V)/n + var(W)/m`. It is 0 for
    groups that do not overlap, which says too much: half the weight of one sample of the smaller group is the least
    that is returned. With a single sample in a group it is the largest possible one, the root of
    :math:`A (1 - A) / \min(n, m)`.

    Args:
        positive: Scores (n,).
        negative: Scores (m,).

    Returns:
        The area, 0.5 if nothing is told apart, and its standard error for independent samples.

    Raises:
        ValueError: A group is empty or holds numbers that are not finite.

    Example:
        >>> import torch
        >>> attack_area(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0]))[0]
        0.875
    """
    for name, scores in (("positive", positive), ("negative", negative)):
        if scores.ndim != 1 or not len(scores) or not bool(torch.isfinite(scores).all()):
            raise ValueError(f"`{name}` must be (n,) finite scores, at least one, got {tuple(scores.shape)}")
    positive, negative = positive.double(), negative.double()
    above, below = _share_below(positive, negative), 1 - _share_below(negative, positive)
    area, fewest = float(above.mean()), min(len(positive), len(negative))
    variance = area * (1 - area) / fewest
    if fewest > 1:
        variance = float(above.var() / len(above) + below.var() / len(below))
    return area, max(variance**0.5, 0.5 / fewest)


def _share_below(scores: Tensor, others: Tensor) -> Tensor:
    ordered = others.sort().values
    strictly, ties = (torch.searchsorted(ordered, scores.contiguous(), right=right) for right in (False, True))
    return 0.5 * (strictly + ties).double() / len(others)
