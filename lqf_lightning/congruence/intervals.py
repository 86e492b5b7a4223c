"""How sure the rates of an upgrade are, given that the samples are a draw."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from lqf_lightning.congruence.flip_report import flip_rates

_VALUES_AT_ONCE = 1_000_000  # bounds memory; torch's quantiles accept 16 million

Rates = dict[str, Tensor]


class Interval(NamedTuple):
    """A quantity and where it may lie; double precision.

    Attributes:
        estimate: The quantity itself.
        low: Lower end.
        high: Upper end.
        undefined: Share of resamples in which the quantity is not defined.
    """

    estimate: Tensor
    low: Tensor
    high: Tensor
    undefined: Tensor


def flip_intervals(
    table: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0, tolerated: float = 0.05
) -> dict[str, Interval]:
    r"""Bootstrap percentile intervals of the rates of an upgrade.

    Drawing N samples with replacement draws the counts from a multinomial distribution, so the counts are enough:

    .. math:: n^* \sim \mathrm{Multinomial}(N, n / N), \qquad
        [\, Q_{(1-\ell)/2}(r(n^*)),\; Q_{(1+\ell)/2}(r(n^*)) \,]

    The draw happens on the CPU and depends on counts and seed alone: all ranks get the same. A count of zero is zero
    in every resample, so that a rate of zero has an interval of no width; with 95 % confidence such a rate is below
    about 3 / N.

    Args:
        table: Whole numbers (..., 2, 2): [old model right?, new model right?].
        level: Coverage aimed at.
        resamples: Number of draws R.
        seed: Another seed draws other resamples.
        tolerated: Largest share of resamples in which a quantity may be undefined. Up to it the interval is that of
            the others, beyond it NaN.

    Returns:
        An interval of shape (...) for every rate of `FlipReport`.

    Raises:
        ValueError: The table is none of counts, or an option is outside its range.

    Example:
        >>> import torch
        >>> interval = flip_intervals(torch.tensor([[200, 100], [60, 640]]))["nfr"]
        >>> [round(float(value), 3) for value in interval]
        [0.06, 0.046, 0.075, 0.0]
    """  # noqa: DOC502 - raised by _check
    _check(table, (2, 2), level, resamples, tolerated)
    return _bootstrap(table, 2, flip_rates, level, resamples, seed, tolerated)


def joint_table(old_right: Tensor, first_right: Tensor, second_right: Tensor) -> Tensor:
    """Count samples by which of three models is right.

    Args:
        old_right: Whether the old model is right (B,), boolean.
        first_right: The same of a new model (B,).
        second_right: The same of another new model (B,).

    Returns:
        Whole numbers (2, 2, 2): [old right?, first right?, second right?].

    Raises:
        ValueError: Shapes differ or values are not boolean.

    Example:
        >>> import torch
        >>> yes, no = torch.tensor([True]), torch.tensor([False])
        >>> joint_table(yes, no, yes).tolist()
        [[[0, 0], [0, 0]], [[0, 1], [0, 0]]]
    """
    sides = (old_right, first_right, second_right)
    shapes = [tuple(side.shape) for side in sides]
    if len(set(shapes)) > 1 or len(shapes[0]) != 1 or any(side.dtype != torch.bool for side in sides):
        raise ValueError(f"got {shapes} of {[side.dtype for side in sides]}, expected three boolean tensors (B,)")
    cells = 4 * old_right.long() + 2 * first_right.long() + second_right.long()
    return torch.bincount(cells, minlength=8).view(2, 2, 2)


def compare_flips(
    table: Tensor, *, level: float = 0.95, resamples: int = 2000, seed: int = 0, tolerated: float = 0.05
) -> dict[str, Interval]:
    """Bootstrap percentile intervals of the differences between two upgrades of the same old model.

    Samples are drawn with the answers of all three models, so that what is hard for both new models cancels. An
    interval without 0 tells the two apart.

    Args:
        table: Whole numbers (..., 2, 2, 2), from `joint_table`.
        level: Coverage aimed at.
        resamples: Number of draws R.
        seed: Another seed draws other resamples.
        tolerated: Largest share of resamples in which a difference may be undefined.

    Returns:
        An interval of shape (...) for the second model's rate less the first model's, for every rate of `FlipReport`
        but `error_old`, which they share.

    Raises:
        ValueError: The table is none of counts, or an option is outside its range.

    Example:
        >>> import torch
        >>> difference = compare_flips(torch.tensor([[[150, 20], [30, 100]], [[20, 80], [40, 560]]]))["nfr"]
        >>> [round(float(value), 3) for value in difference]  # the second has fewer negative flips
        [-0.04, -0.061, -0.019, 0.0]
    """  # noqa: DOC502 - raised by _check
    _check(table, (2, 2, 2), level, resamples, tolerated)
    return _bootstrap(table, 3, _differences, level, resamples, seed, tolerated)


def _differences(table: Tensor) -> Rates:
    first, second = flip_rates(table.sum(-1)), flip_rates(table.sum(-2))
    return {name: second[name] - first[name] for name in first if name != "error_old"}


def _bootstrap(
    table: Tensor,
    axes: int,
    rates: Callable[[Tensor], Rates],
    level: float,
    resamples: int,
    seed: int,
    tolerated: float,
) -> dict[str, Interval]:
    table = table.detach().cpu()
    shape = table.shape[: table.ndim - axes]
    counts = table.reshape(math.prod(shape), *table.shape[-axes:])
    generator = torch.Generator().manual_seed(seed)
    ends: dict[str, list[Tensor]] = {name: [torch.zeros(3, 0, dtype=torch.float64)] for name in rates(counts)}
    for part in torch.split(counts, max(1, _VALUES_AT_ONCE // resamples)) if len(counts) else ():
        drawn = _resample(part.flatten(1), resamples, generator).reshape(resamples, *part.shape)
        for name, values in rates(drawn).items():
            ends[name].append(_ends(values, level, tolerated))
    intervals = {}
    for name, estimate in rates(counts).items():
        low, high, undefined = torch.cat(ends[name], 1).unbind(0)
        intervals[name] = Interval(*(value.reshape(shape) for value in (estimate, low, high, undefined)))
    return intervals


def _resample(counts: Tensor, resamples: int, generator: torch.Generator) -> Tensor:
    # A multinomial draw is a chain of binomial ones: each cell takes its share of the samples that are left.
    left = counts.sum(1).double().expand(resamples, -1)
    rest = counts.sum(1)
    drawn = []
    for cell in counts.unbind(1):
        share = (cell.double() / rest.clamp(min=1)).expand(resamples, -1)
        drawn.append(torch.binomial(left, share, generator=generator))
        left, rest = left - drawn[-1], rest - cell
    return torch.stack(drawn, -1)


def _ends(values: Tensor, level: float, tolerated: float) -> Tensor:
    undefined = values.isnan().double().mean(0)
    quantiles = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.nanquantile(values, quantiles, dim=0).masked_fill(undefined > tolerated, torch.nan)
    return torch.stack([low, high, undefined])


def _check(table: Tensor, cells: tuple[int, ...], level: float, resamples: int, tolerated: float) -> None:
    if table.shape[-len(cells) :] != cells or table.is_floating_point() or bool((table < 0).any()):
        raise ValueError(
            f"got {table.dtype} of shape {tuple(table.shape)}, expected counts (..., {', '.join(map(str, cells))}), "
            "whole numbers that are not negative"
        )
    if not 0 < level < 1:
        raise ValueError(f"level must lie between 0 and 1, got {level}")
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1, got {resamples}")
    if not 0 <= tolerated <= 1:
        raise ValueError(f"tolerated must lie between 0 and 1, got {tolerated}")
