"""Minimize a smooth function of a few numbers with as few evaluations as possible."""

import math

import torch
from torch import Tensor

_DECREASE = 1e-4  # part of the linearly predicted decrease that a step must achieve (Armijo)


class QuasiNewton:
    r"""BFGS in a box, for functions whose every value is dear; the caller evaluates.

    The inverse Hessian is estimated from differences of gradients (Nocedal and Wright, Numerical Optimization, 6.17),
    and steps are shortened until the value sinks (Armijo). Points are numbers whose natural unit is 1, as logarithms
    are: the first step and later ones are limited in that unit.

    Args:
        start: First point (d,), float64.
        tolerance: The search ends when another step promises less, or when two in a row gain less.
        reach: How far every number may move from `center`.
        center: Middle of the box (d,); None means the start.
        longest: Largest change of a number in one step; the first is half as long.

    Attributes:
        point: Where the function is to be evaluated next (d,).

    Example:
        >>> import torch
        >>> search = QuasiNewton(torch.tensor([1.0, -1.0], dtype=torch.float64), tolerance=1e-6)
        >>> pull = torch.tensor([1.0, 10.0])
        >>> while search.tell(float((pull * search.point**2).sum()), 2 * pull * search.point):
        ...     pass
        >>> bool(search.point.abs().max() < 1e-2)
        True
    """

    def __init__(
        self,
        start: Tensor,
        *,
        tolerance: float,
        reach: float = 12.0,
        center: Tensor | None = None,
        longest: float = 2.0,
    ) -> None:
        self._center = (start if center is None else center).clone()
        self.tolerance, self.reach, self.longest = tolerance, reach, longest
        self.point = self._inside(start)
        self._best, self._value, self._gradient = self.point, math.inf, torch.zeros_like(start)
        self._inverse: Tensor | None = None
        self._direction, self._length, self._idle = torch.zeros_like(start), 1.0, 0

    def tell(self, value: float, gradient: Tensor) -> bool:
        """Learn the function at `point`, and move `point` on.

        Args:
            value: There; infinite where the function is not defined, then the gradient plays no part.
            gradient: There (d,), float64.

        Returns:
            Whether to go on.

        Raises:
            ValueError: The function is not finite at the start.
        """
        moved = self.point - self._best
        if self._value == math.inf and not math.isfinite(value):
            raise ValueError(f"the search needs a finite value to start from, got {value}")
        enough = self._value + _DECREASE * float(self._gradient @ moved)
        if not value <= enough:
            return self._shorten(value, float(self._gradient @ moved))
        if math.isfinite(self._value):
            self._learn(moved, gradient - self._gradient)
            self._idle = self._idle + 1 if self._value - value < self.tolerance else 0
        self._best, self._value, self._gradient = self.point, value, gradient
        return self._idle < 2 and self._aim()

    def _inside(self, point: Tensor) -> Tensor:
        return torch.minimum(torch.maximum(point, self._center - self.reach), self._center + self.reach)

    def _aim(self) -> bool:
        gradient, steepest = self._gradient, float(self._gradient.abs().max())
        if steepest == 0:
            return False
        if self._inverse is None:
            direction = gradient * (-0.5 * self.longest / steepest)
        else:
            direction = -self._inverse @ gradient
            direction = direction * min(1.0, self.longest / float(direction.abs().max()))
        self._direction, self._length = direction, 1.0
        self.point = self._inside(self._best + direction)
        promised = -0.5 * float(gradient @ (self.point - self._best))
        return promised > (0.0 if self._inverse is None else 0.1 * self.tolerance)

    def _shorten(self, value: float, slope: float) -> bool:
        # The minimum of the parabola through both values and the slope, within limits.
        bend = 2 * (value - self._value - slope)
        self._length *= min(max(-slope / bend, 0.1), 0.5) if bend > 0 else 0.5
        self.point = self._inside(self._best + self._length * self._direction)
        return -self._length * slope > 0.1 * self.tolerance * _DECREASE and self._length > 1e-4

    def _learn(self, moved: Tensor, change: Tensor) -> None:
        bend = float(moved @ change)
        if bend <= 1e-8 * float(moved.norm() * change.norm()):
            return  # not convex along this step: nothing to learn for an estimate that must be positive
        identity = torch.eye(len(moved)).to(moved)
        if self._inverse is None:
            self._inverse = identity * (bend / float(change @ change))
        turn = identity - torch.outer(moved, change) / bend
        self._inverse = turn @ self._inverse @ turn.T + torch.outer(moved, moved) / bend
