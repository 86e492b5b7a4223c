"""When training gets below a given loss, and how far a subset of the samples can tell."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FRACTIONS = (0.5, 0.3, 0.1, 0.05)
AGREEMENT = 0.05


@dataclass(frozen=True)
class TrainingTime:
    """Steps to a loss.

    Attributes:
        fraction: The loss, as a fraction of that before training.
        steps: Steps after which the loss stays at or below it; None if the curve does not get there.
        lower_bound: Whether no more is known than that it takes at least so many; without `steps`, more than the curve
            has.
    """

    fraction: float
    steps: int | None
    lower_bound: bool = False


def smoothed(curve: Tensor, window: int) -> Tensor:
    """Mean of the last `window` numbers, as soon as there are so many.

    Args:
        curve: Numbers (T,).
        window: Of them, at least 1; 1 changes nothing.

    Returns:
        Means (T,), NaN where there are not enough numbers.

    Raises:
        ValueError: The window is not positive.

    Example:
        >>> import torch
        >>> smoothed(torch.tensor([4.0, 2.0, 0.0]), 2).tolist()
        [nan, 3.0, 1.0]
    """
    if window < 1:
        raise ValueError(f"the window must hold at least one step, got {window}")
    if len(curve) < window:
        return torch.full_like(curve, math.nan)
    means = curve.unfold(0, window, 1).mean(1)
    return torch.cat([curve.new_full((window - 1,), math.nan), means])


def first_passage(curve: Tensor, level: float, window: int = 1) -> int | None:
    """The first step from which on the (smoothed) loss is at or below a level, and stays there.

    Args:
        curve: Loss after t steps (T + 1,), t = 0, 1, ...
        level: The loss to reach.
        window: Steps that are averaged: 1 on all samples, an epoch with minibatches.

    Returns:
        The step, or None if the loss is above the level at the end, is not finite, or the curve is too short.

    Example:
        >>> import torch
        >>> first_passage(torch.tensor([9.0, 4.0, 6.0, 3.0, 2.0]), 5.0)
        3
    """
    means = smoothed(curve, window)
    above = ~(means <= level)  # what is no number is not below either
    if bool(above[-1]):
        return None
    last = torch.nonzero(above)
    return 0 if not len(last) else int(last[-1]) + 1


def training_times(
    curve: Tensor, fractions: Sequence[float] = FRACTIONS, *, window: int = 1, initial: float | None = None
) -> list[TrainingTime]:
    """Steps to fractions of the loss before training.

    Args:
        curve: Loss after t steps (T + 1,).
        fractions: In (0, 1).
        window: See `first_passage`.
        initial: The loss before training; None: where the curve begins.

    Returns:
        One entry per fraction. Fractions out of range are refused as by `refuse_fractions`.

    Example:
        >>> import torch
        >>> [time.steps for time in training_times(torch.tensor([8.0, 4.0, 2.0]), [0.5, 0.1])]
        [1, None]
    """
    refuse_fractions(fractions)
    start = float(curve[0]) if initial is None else initial
    return [TrainingTime(fraction, first_passage(curve, fraction * start, window)) for fraction in fractions]


def refuse_fractions(fractions: Sequence[float]) -> None:
    """Check the losses that are asked for.

    Args:
        fractions: Of the loss before training.

    Raises:
        ValueError: There are none, or one is not between 0 and 1.
    """
    several = isinstance(fractions, Sequence) and len(fractions) > 0
    if not several or not all(0 < fraction < 1 for fraction in fractions):
        raise ValueError(
            f"thresholds are fractions of the loss before training in (0, 1), several or one, got {fractions}. Set "
            f"callbacks.training_time.thresholds={list(FRACTIONS)}, or thresholds for lqf-predict"
        )


def extrapolated_times(
    subset: Tensor,
    half: Tensor,
    fractions: Sequence[float] = FRACTIONS,
    *,
    window: int = 1,
    initial: tuple[float, float] | None = None,
) -> list[TrainingTime]:
    r"""Steps to fractions of the loss for many samples, from the curves of a subset and of half of it.

    At the same learning rate on the mean loss, relative losses :math:`L_n(t) / L_n(0)` approach a limit as n grows,
    from below late in training: small sets have fewer small eigenvalues. Where subset and half agree on the number of
    steps, to 5 %, it is taken for that of all; else it is a lower bound.

    Args:
        subset: Loss of n_0 samples after t steps (T + 1,).
        half: Loss of half of them after t steps, at the same learning rates.
        fractions: In (0, 1).
        window: See `first_passage`.
        initial: The losses of both before training; None: where the curves begin.

    Returns:
        One entry per fraction, a `lower_bound` unless the two agree. Where the subset does not get there in T steps,
        the number is None: it is more than T.

    Example:
        >>> import torch
        >>> t = torch.arange(200)
        >>> found = extrapolated_times(0.9**t + 0.02 * 0.99**t, 0.9**t + 0.02 * 0.98**t, [0.5, 0.01])
        >>> [(time.steps, time.lower_bound) for time in found]
        [(7, False), (73, True)]
    """
    found = []
    one, two = initial or (float(subset[0]), float(half[0]))
    times = training_times(subset, fractions, window=window, initial=one)
    others = training_times(half, fractions, window=window, initial=two)
    for time, other in zip(times, others, strict=True):
        sure = _agree(subset / one, half / two, time, other, window)
        found.append(TrainingTime(time.fraction, time.steps, not sure))
    return found


def _agree(subset: Tensor, half: Tensor, time: TrainingTime, other: TrainingTime, window: int) -> bool:
    if time.steps is None or other.steps is None:
        return False
    one, two = _crossing(subset, time, window), _crossing(half, other, window)
    return abs(one - two) <= AGREEMENT * one


def _crossing(curve: Tensor, time: TrainingTime, window: int) -> float:
    # Between two steps, so that few steps can agree to 5 %: the curve, of relative losses, is taken for a line there.
    step, means = time.steps or 0, smoothed(curve, window)
    if step == 0 or bool(torch.isnan(means[step - 1])):
        return float(step)
    before, after = float(means[step - 1]), float(means[step])
    return step - 1 + (before - time.fraction) / (before - after)
