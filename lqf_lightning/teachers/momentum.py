"""How much of itself an averaged teacher keeps at every update."""

import math
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant", "cosine"]


@dataclass(frozen=True)
class MomentumSchedule:
    """The momentum of update t of T, counted from 0.

    ``constant``: m. ``cosine``: ``1 - (1 - m) (cos(pi t / T) + 1) / 2``, from m to 1 (Grill et al., 2020). With
    `warmup`, at most ``(1 + t) / (10 + t)``, so that the first averages forget where they started.

    Attributes:
        momentum: The number m, in [0, 1].
        shape: "constant" or "cosine".
        warmup: Whether the first updates keep less.

    Example:
        >>> schedule = MomentumSchedule(0.98, "cosine")
        >>> [round(schedule.at(t, 4), 5) for t in range(5)]
        [0.98, 0.98293, 0.99, 0.99707, 1.0]
        >>> [round(MomentumSchedule(0.999, warmup=True).at(t), 3) for t in (0, 10, 100_000)]
        [0.1, 0.55, 0.999]
    """

    momentum: float = 0.999
    shape: Shape = "constant"
    warmup: bool = False

    def __post_init__(self) -> None:
        """Check the options.

        Raises:
            ValueError: The momentum is no share, or the shape has another name.
        """
        if not 0 <= self.momentum <= 1:
            raise ValueError(f"`momentum` must be in [0, 1], got {self.momentum}. Set method.momentum=0.999")
        if self.shape not in ("constant", "cosine"):
            raise ValueError(
                f"`momentum_schedule` must be 'constant' or 'cosine', got {self.shape!r}. "
                "Set method.momentum_schedule=constant"
            )

    def at(self, update: int, total: int | None = None) -> float:
        """The momentum of one update.

        Args:
            update: Its number t, from 0.
            total: Number T of updates of the whole run; needed by "cosine".

        Returns:
            A number in [0, 1].

        Raises:
            ValueError: "cosine" is not told the number of updates.
        """
        momentum = self.momentum
        if self.shape == "cosine":
            if total is None:
                raise ValueError("a cosine needs the number of updates of the whole run: set `teacher.total_updates`")
            share = min(update / max(total, 1), 1.0)
            momentum = 1 - (1 - momentum) * (math.cos(math.pi * share) + 1) / 2
        return min(momentum, (1 + update) / (10 + update)) if self.warmup else momentum
