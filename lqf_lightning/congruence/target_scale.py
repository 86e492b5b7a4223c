"""The outputs of an old model on the scale of a new model's targets."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TargetScale:
    r"""Brings outputs of a reference to the scale of the targets, without changing which one is the largest.

    .. math:: z_c = k\, o_c \quad\text{or}\quad z_c = k\, (o_c - \bar o) + \ell

    Attributes:
        factor: k, positive.
        level: The mean that outputs get; None leaves it as it is, times k.

    Example:
        >>> import torch
        >>> TargetScale(2.0)(torch.tensor([[1.0, 3.0]])).tolist()
        [[2.0, 6.0]]
        >>> TargetScale(2.0, level=5.0)(torch.tensor([[1.0, 3.0]])).tolist()
        [[3.0, 7.0]]
    """

    factor: float
    level: float | None = None

    def __call__(self, outputs: Tensor) -> Tensor:
        """Bring outputs to scale.

        Args:
            outputs: Outputs of the reference for the classes that both models know (B, S).

        Returns:
            z (B, S).
        """
        if self.level is None:
            return self.factor * outputs
        return self.factor * (outputs - outputs.mean(-1, keepdim=True)) + self.level


def scale_sums(outputs: Tensor, position: Tensor) -> Tensor:
    """What the scale of a reference is fitted from; sums of parts of the data add up.

    Args:
        outputs: Outputs o of the reference for the classes that both models know (n, S).
        position: Position of the right class among these (n,); -1 leaves the sample out.

    Returns:
        Sums over samples of the right class's centered output and of all squared centered outputs (2,), double.

    Raises:
        ValueError: There is not one position per sample.

    Example:
        >>> import torch
        >>> scale_sums(torch.tensor([[1.0, 3.0], [9.0, 0.0]]), torch.tensor([1, -1])).tolist()
        [1.0, 2.0]
    """
    if position.shape != outputs.shape[:1]:
        raise ValueError(f"expected one position per sample ({len(outputs)},), got {tuple(position.shape)}")
    kept = position >= 0
    chosen = outputs[kept].double()
    centered = chosen - chosen.mean(1, keepdim=True)
    right = centered.gather(1, position[kept].unsqueeze(1)).sum()
    return torch.stack([right, centered.square().sum()])


def fitted_scale(sums: Tensor, target_scale: float, columns: int) -> TargetScale:
    r"""The scale at which a reference is nearest to the targets, in least squares.

    With S shared classes and targets :math:`s\, e_y` the fit of :math:`k\, (o - \bar o) + s / S` to the targets of
    these classes is :math:`k = s \sum_i (o_{y_i} - \bar o_i) / \sum_i \lVert o_i - \bar o_i \rVert^2`. The level s/S is
    the mean of the targets, and also what least squares would choose.

    Args:
        sums: As of `scale_sums`, over the training samples whose class the reference knows.
        target_scale: Value s of the right class.
        columns: Number S of shared classes.

    Returns:
        The scale.

    Raises:
        ValueError: k is not positive: the reference does not tell the right class from others.

    Example:
        >>> import torch
        >>> scale = fitted_scale(torch.tensor([2.0, 4.0]), target_scale=10.0, columns=2)
        >>> scale.factor, scale.level
        (5.0, 5.0)
    """
    right, squares = (float(value) for value in sums)
    factor = target_scale * right / squares if squares > 0 else math.nan
    if not 0 < factor < math.inf:
        raise ValueError(
            f"the reference's scale would be {factor:.3g}: on the training samples its outputs for {columns} shared "
            "classes are not larger for the right one. Set method.reference_scale=1.0 to match them as they are, or "
            "reference to a model that has learned these classes"
        )
    return TargetScale(factor, target_scale / columns)
