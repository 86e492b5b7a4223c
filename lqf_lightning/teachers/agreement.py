"""How far one network's prediction of another one's output is off."""

import torch
from torch import Tensor
from torch.nn import functional as F

_SMALLEST = 1e-8  # shorter vectors than this are not stretched to length 1: the gradient would have no bound


def byol_regression(prediction: Tensor, target: Tensor) -> Tensor:
    r"""Squared distance of directions (Grill et al., Bootstrap Your Own Latent, NeurIPS 2020, eq. 2).

    .. math:: \frac1B \sum_i \left\lVert \frac{p_i}{\lVert p_i \rVert} - \frac{t_i}{\lVert t_i \rVert} \right\rVert^2
        = \frac1B \sum_i (2 - 2 \cos(p_i, t_i))

    One direction only: the symmetric loss is the sum of two. Detach the target where it is not to learn. The
    difference is what is computed, because 2 - 2 cos of nearly equal directions is all rounding.

    Args:
        prediction: p (B, D).
        target: t (B, D).

    Returns:
        A scalar between 0 and 4, in single precision at least; 0, with a graph, for a batch without samples.

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> prediction = torch.tensor([[3.0, 0.0], [0.0, 1.0]])
        >>> byol_regression(prediction, torch.tensor([[1.0, 0.0], [5.0, 0.0]])).item()  # the same, a right angle
        1.0
    """
    if prediction.ndim != 2 or prediction.shape != target.shape:
        raise ValueError(
            f"expected predictions and targets of one shape (B, D), got {tuple(prediction.shape)} and "
            f"{tuple(target.shape)}"
        )
    dtype = torch.promote_types(torch.promote_types(prediction.dtype, target.dtype), torch.float32)
    unit = F.normalize(prediction.to(dtype), dim=1, eps=_SMALLEST)
    apart = unit - F.normalize(target.to(dtype), dim=1, eps=_SMALLEST)
    return apart.square().sum() / max(len(apart), 1)
