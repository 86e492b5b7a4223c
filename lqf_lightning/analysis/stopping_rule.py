"""When a scrub is near enough to the optimum."""

import math
from dataclasses import dataclass

from lqf_lightning.linear import Certificate

_FIRST_GUESS = 0.3  # what the first step leaves of the gradient, before anything is known
_PATIENCE = 8  # steps in which conjugate gradients may rise, as they do between plateaus
_IMPROVED = 0.9


@dataclass(frozen=True)
class StoppingRule:
    """A relative gradient, a distance, or both, that a certificate must not exceed.

    Attributes:
        tolerance: Largest relative gradient; None: any.
        distance: Largest bound of `|dw - dw*|` in the norm of the metric; None: any.

    Raises:
        ValueError: A limit is not positive and finite, or there is none.

    Example:
        >>> StoppingRule(distance=0.5).gap(Certificate(0.1, 2.0, 7.0))
        4.0
    """

    tolerance: float | None = None
    distance: float | None = None

    def __post_init__(self) -> None:
        limits = {"tolerance": self.tolerance, "distance": self.distance}
        odd = {name: limit for name, limit in limits.items() if limit is not None and not 0 < limit < math.inf}
        if odd or self.tolerance is None is self.distance:
            raise ValueError(f"a scrub needs a positive tolerance, distance or both, got {limits}. Set tolerance=1e-3")

    def gap(self, certificate: Certificate) -> float:
        """How often a certificate exceeds what is asked for.

        Args:
            certificate: Of a point.

        Returns:
            At most 1 if the point is near enough.
        """
        gaps = []
        if self.tolerance is not None:
            gaps.append(certificate.relative_gradient / self.tolerance)
        if self.distance is not None:
            gaps.append(certificate.distance_bound / self.distance)
        return max(gaps)


def next_is_enough(gaps: list[float]) -> bool:
    """Guess from the gaps of all steps so far whether one more will do.

    Args:
        gaps: Of start and steps.

    Returns:
        Whether the mean reduction of a step, applied once more, gets below 1.

    Example:
        >>> next_is_enough([100.0, 20.0]), next_is_enough([10.0, 5.0])
        (False, False)
        >>> next_is_enough([16.0, 8.0, 4.0, 1.5])
        True
    """
    steps = len(gaps) - 1
    reduction = (gaps[-1] / gaps[0]) ** (1 / steps) if steps else _FIRST_GUESS
    return gaps[-1] * min(1.0, reduction) <= 1.0


def stands_still(gaps: list[float]) -> bool:
    """Tell from the gaps of all steps so far whether the last ones have brought nothing, which is rounding.

    Args:
        gaps: Of start and steps.

    Returns:
        Whether the best of the last steps is hardly better than the best before.

    Example:
        >>> stands_still([1.0] * 20), stands_still([0.5**step for step in range(20)])
        (True, False)
    """
    return len(gaps) > _PATIENCE and min(gaps[-_PATIENCE:]) > _IMPROVED * min(gaps[:-_PATIENCE])
