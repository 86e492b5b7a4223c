"""Training losses, one normalization: summed over classes, averaged over the batch."""

import math
from functools import partial
from typing import Literal, Protocol

import torch.nn.functional as F
from torch import Tensor

LossName = Literal["squared", "cross_entropy"]


class Loss(Protocol):
    """A training loss."""

    def __call__(self, logits: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
        """Evaluate it.

        Args:
            logits: Network outputs (B, C).
            target: Class positions (B,).
            weight: How much each sample counts (B,); None means 1.
        """
        ...


def scaled_squared_loss(logits: Tensor, target: Tensor, scale: float = 15.0, *, weight: Tensor | None = None) -> Tensor:
    r"""Half the squared distance to scaled one-hot targets.

    .. math:: \frac{1}{2B} \sum_i a_i\, \lVert f_i - \alpha\, e_{y_i} \rVert^2

    The scale follows Hui and Belkin (2021) and LQF (Achille et al., CVPR 2021, eq. 3). `torch.nn.MSELoss` divides by
    the number of classes as well and has no 1/2: its value is 2/C times this one.

    Args:
        logits: Network outputs (B, C).
        target: Class positions (B,).
        scale: Value alpha of the right class; the others are 0.
        weight: How much each sample counts, a (B,); None means 1.

    Returns:
        The loss, a scalar.

    Example:
        >>> import torch
        >>> scaled_squared_loss(torch.tensor([[3.0, 1.0]]), torch.tensor([0]), scale=5.0).item()
        2.5
    """
    wanted = scale * F.one_hot(target, logits.shape[-1]).to(logits.dtype)
    return _mean(0.5 * (logits - wanted).square().sum(-1), weight)


def cross_entropy(logits: Tensor, target: Tensor, *, weight: Tensor | None = None) -> Tensor:
    r"""Cross-entropy in nats, of which samples may take more than one share.

    .. math:: -\frac1B \sum_i a_i \log \mathrm{softmax}(f_i)_{y_i}

    Args:
        logits: Network outputs (B, C).
        target: Class positions (B,).
        weight: How much each sample counts, a (B,); None means 1.

    Returns:
        The loss, a scalar, divided by the number of samples whatever they weigh.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 2)
        >>> round(cross_entropy(logits, torch.tensor([0, 1]), weight=torch.tensor([3.0, 1.0])).item(), 4)  # 2 log 2
        1.3863
    """
    if weight is None:
        return F.cross_entropy(logits, target)
    return _mean(F.cross_entropy(logits, target, reduction="none"), weight)


def _mean(losses: Tensor, weight: Tensor | None) -> Tensor:
    return losses.mean() if weight is None else (losses * weight.to(losses)).mean()


def choose_loss(name: LossName, target_scale: float) -> Loss:
    """The loss function that a method's `loss` option names.

    Args:
        name: "squared" or "cross_entropy".
        target_scale: Scale of the one-hot targets of the squared loss; cross-entropy has none.

    Returns:
        A function of logits (B, C), class positions (B,) and, if need be, sample weights (B,).

    Raises:
        ValueError: The name is neither, or the scale is not a positive number.
    """
    if not 0 < target_scale < math.inf:
        raise ValueError(f"`target_scale` must be positive, got {target_scale}. Set method.target_scale=15")
    if name == "squared":
        return partial(scaled_squared_loss, scale=target_scale)
    if name == "cross_entropy":
        return cross_entropy
    raise ValueError(f"`loss` must be 'squared' or 'cross_entropy', got {name!r}. Set method.loss=squared")
