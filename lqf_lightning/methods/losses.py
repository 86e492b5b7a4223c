"""Training losses, one normalization: summed over classes, averaged over the batch."""

import math
from collections.abc import Callable
from functools import partial
from typing import Literal

import torch.nn.functional as F
from torch import Tensor

LossName = Literal["squared", "cross_entropy"]


def scaled_squared_loss(logits: Tensor, target: Tensor, scale: float = 15.0) -> Tensor:
    r"""Half the squared distance to scaled one-hot targets.

    .. math:: \frac{1}{2B} \sum_i \lVert f_i - \alpha\, e_{y_i} \rVert^2

    The scale follows Hui and Belkin (2021) and LQF (Achille et al., CVPR 2021, eq. 3). `torch.nn.MSELoss` divides by
    the number of classes as well and has no 1/2: its value is 2/C times this one.

    Args:
        logits: Network outputs (B, C).
        target: Class positions (B,).
        scale: Value alpha of the right class; the others are 0.

    Returns:
        The loss, a scalar.

    Example:
        >>> import torch
        >>> scaled_squared_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([0]), scale=5.0).item()
        2.5
    """
    wanted = scale * F.one_hot(target, logits.shape[-1]).to(logits.dtype)
    return 0.5 * (logits - wanted).square().sum(-1).mean()


def choose_loss(name: LossName, target_scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """The loss function that a method's `loss` option names.

    Args:
        name: "squared" or "cross_entropy".
        target_scale: Scale of the one-hot targets of the squared loss; cross-entropy has none.

    Returns:
        A function of logits (B, C) and class positions (B,).

    Raises:
        ValueError: The name is neither, or the scale is not a positive number.
    """
    if not 0 < target_scale < math.inf:
        raise ValueError(f"`target_scale` must be positive, got {target_scale}. Set method.target_scale=15")
    if name == "squared":
        return partial(scaled_squared_loss, scale=target_scale)
    if name == "cross_entropy":
        return F.cross_entropy
    raise ValueError(f"`loss` must be 'squared' or 'cross_entropy', got {name!r}. Set method.loss=squared")
