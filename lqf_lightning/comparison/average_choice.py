"""Which average of two networks to use: the one with the fewest negative flips among those that are accurate enough."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from lqf_lightning.comparison.flips import Comparison
from lqf_lightning.congruence.flip_report import flip_report

_ROUNDING = 1e-9


@dataclass(frozen=True)
class AveragePoint:
    """One average on the validation images.

    Attributes:
        kind: How the weights are averaged.
        share: Share of the old network.
        error: Error rate on all images whose class the new model knows.
        nfr: Negative flip rate, on images whose class both know.
        pfr: Positive flip rate.
        relative_nfr: Relative negative flip rate.
    """

    kind: str
    share: float
    error: float
    nfr: float
    pfr: float
    relative_nfr: float


def point_of(kind: str, share: float, comparison: Comparison) -> AveragePoint:
    """Measure an average.

    Args:
        kind: How the weights are averaged.
        share: Share of the old network.
        comparison: Its predictions beside the old model's.

    Returns:
        The point.
    """
    report = flip_report(comparison.table)
    return AveragePoint(kind, share, comparison.error, report.nfr, report.pfr, report.relative_nfr)


def measure_averages(
    kinds: Sequence[str], shares: Iterable[float], measure: Callable[[str, float], Comparison]
) -> list[AveragePoint]:
    """Measure a grid of averages.

    Args:
        kinds: How the weights are averaged.
        shares: Shares of the old network.
        measure: Predicts with one average, and sets its answers beside the old model's.

    Returns:
        A point for each kind and share, by kind, shares ascending.
    """
    ordered = sorted(float(share) for share in shares)
    return [point_of(kind, share, measure(kind, share)) for kind in kinds for share in ordered]


def choose_average(
    points: Sequence[AveragePoint], new: AveragePoint, max_error_increase: float = 0.0
) -> AveragePoint | None:
    r"""Choose the average with the lowest negative flip rate.

    .. math:: \min_a \mathrm{NFR}(a) \quad\text{subject to}\quad \mathrm{ER}(a) \le \mathrm{ER_n} + \epsilon

    Of equal ones, the most accurate is taken, then that with the smallest share of the old network. The old network
    itself (share 1) is no choice: keeping it is no upgrade.

    Args:
        points: The averages on validation images.
        new: The new model on these images.
        max_error_increase: How much the error rate may exceed the new model's.

    Returns:
        The choice, or None if the new model itself does best, or no average is accurate enough.

    Example:
        >>> new = AveragePoint("new", 0.0, error=0.20, nfr=0.10, pfr=0.3, relative_nfr=0.5)
        >>> half = AveragePoint("bcwi", 0.5, error=0.19, nfr=0.04, pfr=0.3, relative_nfr=0.2)
        >>> most = AveragePoint("bcwi", 0.9, error=0.25, nfr=0.01, pfr=0.3, relative_nfr=0.1)
        >>> choose_average([new, half, most], new).share
        0.5
        >>> choose_average([most], new) is None
        True
    """
    limit = new.error + max_error_increase + _ROUNDING
    able = [point for point in points if point.share < 1 and point.error <= limit]
    best = min([new, *able], key=lambda point: (point.nfr, point.error, point.share))
    return None if best is new else best


def least_increase(points: Sequence[AveragePoint], new: AveragePoint) -> float | None:
    """Find what it would take to lower negative flips by an average.

    Args:
        points: The averages on validation images.
        new: The new model on these images.

    Returns:
        The smallest `max_error_increase` with which `choose_average` finds one with fewer negative flips; None if there
        is none.
    """
    better = [point.error - new.error for point in points if point.share < 1 and point.nfr < new.nfr]
    return max(min(better), 0.0) if better else None
