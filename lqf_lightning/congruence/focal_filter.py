"""How much each sample is held to the old model."""

from typing import Literal, get_args

import torch
from torch import Tensor
from torch.nn import functional as F

FilterName = Literal["focal", "negative_flip", "new_wrong", "all", "likelihood", "better"]


@torch.no_grad()
def focus(name: FilterName, new: Tensor, old: Tensor, target: Tensor, old_target: Tensor) -> Tensor:
    """Which samples are in focus, all of them judged by the models as they are, with all of their own classes.

    - "focal": the old model is right (Yan et al., Positive-Congruent Training, CVPR 2021, table 1);
    - "negative_flip": the old model is right and the new one wrong, so far;
    - "new_wrong": the new model is wrong, so far;
    - "all": every sample;
    - "likelihood": the probability that the old model gives the label;
    - "better": the old model's cross-entropy is not larger than the new one's (Xie et al., Regression Bugs Are In Your
      Model, ACL 2021).

    Args:
        name: One of these.
        new: Outputs of the new model (B, C_new).
        old: Outputs of the old model (B, C_old).
        target: Class positions of the new model (B,).
        old_target: Class positions of the old model (B,), -1 where it does not know the class.

    Returns:
        Focus r (B,) between 0 and 1, without gradient; 0 where the old model does not know the class.

    Raises:
        ValueError: There is no such filter, or a target does not have one class per sample.

    Example:
        >>> old = torch.tensor([[2.0, 1.0], [2.0, 1.0], [2.0, 1.0]])
        >>> new, target = torch.tensor([[3.0, 0.0], [0.0, 3.0], [0.0, 3.0]]), torch.tensor([0, 0, 1])
        >>> [focus(name, new, old, target, old_target=target).tolist() for name in ("focal", "negative_flip")]
        [[1.0, 1.0, 0.0], [0.0, 1.0, 0.0]]
    """
    for label, values in (("target", target), ("old_target", old_target)):
        if values.shape != (len(new),) or len(old) != len(new):
            raise ValueError(
                f"`{label}` must have one class per row of the outputs, got {tuple(values.shape)} for outputs "
                f"{tuple(new.shape)} and {tuple(old.shape)}"
            )
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    new, old, known = new.to(dtype), old.to(dtype), old_target >= 0
    position = old_target.clamp(min=0)
    with torch.autocast(new.device.type, enabled=False):
        if name == "all":
            chosen = known
        elif name == "focal":
            chosen = old.argmax(-1) == old_target
        elif name == "negative_flip":
            chosen = (old.argmax(-1) == old_target) & (new.argmax(-1) != target)
        elif name == "new_wrong":
            chosen = new.argmax(-1) != target
        elif name == "better":
            chosen = _cross_entropy(old, position) <= _cross_entropy(new, target)
        elif name == "likelihood":
            chosen = torch.exp(-_cross_entropy(old, position))
        else:
            raise ValueError(
                f"`filter` must be one of {', '.join(get_args(FilterName))}, got {name!r}. Set method.filter=focal"
            )
    return chosen.to(dtype) * known


def focal_weights(in_focus: Tensor, old_target: Tensor, alpha: float = 1.0, beta: float = 5.0) -> Tensor:
    r"""Weights of the distances (Yan et al., Positive-Congruent Training, CVPR 2021, table 1).

    .. math:: F_i = \alpha + \beta\, r_i

    Args:
        in_focus: Focus r (B,).
        old_target: Class positions of the old model (B,), -1 where it does not know the class: nothing to learn there.
        alpha: Weight of every sample whose class the old model knows.
        beta: Weight that focus adds.

    Returns:
        Weights (B,).

    Raises:
        ValueError: The shapes differ.

    Example:
        >>> focal_weights(torch.tensor([1.0, 0.0, 0.0]), torch.tensor([4, 2, -1])).tolist()
        [6.0, 1.0, 0.0]
    """
    if in_focus.ndim != 1 or in_focus.shape != old_target.shape:
        raise ValueError(
            f"focus and classes must have one value per sample, shape (B,), got {tuple(in_focus.shape)} and "
            f"{tuple(old_target.shape)}"
        )
    return (alpha + beta * in_focus) * (old_target >= 0)


def focal_mean(values: Tensor, weights: Tensor) -> Tensor:
    r"""Weighted sum over a batch, divided by its size, so that samples of weight 0 count as 0.

    .. math:: \frac1B \sum_i F_i\, D_i

    Values of shape (B,) and weights of shape (B, 1) would broadcast to all pairs, whose mean is the product of the
    means: the weights would silently become one number. Hence the shapes are compared.

    Args:
        values: One number per sample (B,).
        weights: One weight per sample (B,).

    Returns:
        A scalar; 0, with a graph, for a batch without samples.

    Raises:
        ValueError: One of them is not of shape (B,).

    Example:
        >>> focal_mean(torch.tensor([1.0, 2.0]), torch.tensor([6.0, 0.0])).item()
        3.0
    """
    if values.ndim != 1 or values.shape != weights.shape:
        raise ValueError(
            f"values and weights must have one number per sample, shape (B,), got {tuple(values.shape)} and "
            f"{tuple(weights.shape)}, which would mix samples"
        )
    return (values * weights).sum() / max(len(values), 1)


def _cross_entropy(outputs: Tensor, target: Tensor) -> Tensor:
    return F.cross_entropy(outputs, target, reduction="none")
