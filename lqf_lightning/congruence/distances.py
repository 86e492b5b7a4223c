"""How far the outputs of a new model are from those of an old one, sample by sample."""

from typing import Literal

import torch
from torch import Tensor

ClassReduction = Literal["mean", "sum"]


def kl_distance(new: Tensor, old: Tensor, temperature: float = 100.0) -> Tensor:
    r"""Divergence of tempered class probabilities, times the squared temperature (FD-KL).

    .. math:: \tau^2 \sum_k p^o_k \left(e^{d_k} - 1 - d_k\right) = \tau^2\,KL(p^o \Vert p^n),
        \qquad d = \log p^n - \log p^o, \quad p = \mathrm{softmax}(z / \tau)

    Yan et al., Positive-Congruent Training (CVPR 2021), eq. 8 prints the other direction and no factor; without the
    factor the term would vanish at the temperatures that help, and at these the directions agree. A constant added to
    all outputs of a sample changes nothing. For large temperatures it tends to the centered `logit_distance` over 2.

    At a temperature of 100 the logarithms differ in their third digit, and the usual form would add up terms that
    cancel: in single precision it is wrong by several percent. All terms of this one are positive, and `d` is taken
    from the difference of the outputs.

    Args:
        new: Outputs of the new model (B, C).
        old: Outputs of the old model (B, C).
        temperature: The divisor tau of the outputs.

    Returns:
        Distances (B,) in nats, in single precision or, for double inputs, in double; autocast does not change them.

    Raises:
        ValueError: The temperature is not positive.

    Example:
        >>> old, new = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, -1.0]])
        >>> round(kl_distance(new, old, temperature=1.0).item(), 4)  # log((e + 1/e) / 2)
        0.4338
        >>> round(kl_distance(new, old).item(), 4)  # half the mean of 1 and 1
        0.5
    """
    if not temperature > 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}. Set method.temperature=100")
    new, old = _comparable(new, old)
    with torch.autocast(new.device.type, enabled=False):
        shift = (new / temperature).logsumexp(-1, keepdim=True) - (old / temperature).logsumexp(-1, keepdim=True)
        d = (new - old) / temperature - shift
        p_old, p_new = (old / temperature).softmax(-1), (new / temperature).softmax(-1)
        small = d.clamp(max=1)  # beyond, the exponential may overflow where p_old vanishes
        terms = torch.where(d < 1, p_old * (torch.expm1(small) - small), p_new - p_old * (1 + d))
        return temperature**2 * terms.sum(-1)


def logit_distance(
    new: Tensor, old: Tensor, class_reduction: ClassReduction = "mean", centered: bool = False
) -> Tensor:
    r"""Squared difference of the outputs (FD-LM; Yan et al., Positive-Congruent Training, CVPR 2021, table 1).

    .. math:: \frac1C \lVert z^n - z^o \rVert^2 \;(\text{mean}), \qquad
        \frac12 \lVert z^n - z^o \rVert^2 \;(\text{sum, as printed})

    Only the mean is on the scale of `kl_distance`, whatever the number of classes C.

    Args:
        new: Outputs of the new model (B, C).
        old: Outputs of the old model (B, C).
        class_reduction: "mean" or "sum", as above.
        centered: Take the mean difference of each sample out first, which no probability depends on.

    Returns:
        Distances (B,), in single precision or, for double inputs, in double.

    Raises:
        ValueError: The reduction is neither.

    Example:
        >>> old, new = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 3.0]])
        >>> [logit_distance(new, old, reduction).item() for reduction in ("mean", "sum")]
        [5.0, 5.0]
        >>> logit_distance(new, old, centered=True).item()
        1.0
    """
    if class_reduction not in ("mean", "sum"):
        raise ValueError(
            f"`class_reduction` must be 'mean' or 'sum', got {class_reduction!r}. Set method.class_reduction=mean"
        )
    new, old = _comparable(new, old)
    with torch.autocast(new.device.type, enabled=False):
        gap = new - old
        if centered:
            gap = gap - gap.mean(-1, keepdim=True)
        return gap.square().mean(-1) if class_reduction == "mean" else 0.5 * gap.square().sum(-1)


def logit_difference_inhibition(
    new: Tensor,
    old: Tensor,
    margin: float = 0.0,
    power: float = 2.0,
    top_k: int | None = None,
    exclude: Tensor | None = None,
    one_sided: bool = False,
) -> Tensor:
    r"""Power of what the difference of the outputs exceeds a margin by (LDI; Zhao et al., ELODI, 2022).

    .. math:: \frac{1}{|K|} \sum_{k \in K} \max(|z^n_k - z^o_k| - \xi,\, 0)^p

    Differences within the margin cost nothing and have no gradient. With margin 0, power 2 and all classes it is
    `logit_distance`. The classes K are all of them, or those with the highest outputs of the old model, which stay the
    same while the new one trains: classes that it ranks low may move.

    Args:
        new: Outputs of the new model (B, C).
        old: Outputs of the old model (B, C).
        margin: The difference xi that is free.
        power: The exponent p, at least 1.
        top_k: How many classes of each sample count; None means all.
        exclude: Class of each sample that does not count (B,), -1 where all do; mostly its label. None excludes none.
        one_sided: Only outputs that rise above the old ones cost.

    Returns:
        Distances (B,), in single precision or, for double inputs, in double.

    Raises:
        ValueError: The margin is negative, the power below 1, or there are fewer classes than `top_k`.

    Example:
        >>> old, new = torch.tensor([[3.0, 2.0, 0.0]]), torch.tensor([[5.0, 1.0, 4.0]])
        >>> logit_difference_inhibition(new, old, margin=1.0).item()  # (1 + 0 + 9) / 3
        3.3333332538604736
        >>> logit_difference_inhibition(new, old, margin=1.0, top_k=2).item()
        0.5
        >>> logit_difference_inhibition(new, old, one_sided=True, exclude=torch.tensor([0])).item()  # (0 + 16) / 2
        8.0
    """
    if not margin >= 0:
        raise ValueError(f"`margin` must be at least 0, got {margin}. Set method.margin=0")
    if not power >= 1:
        raise ValueError(f"`power` must be at least 1, for a gradient at 0, got {power}. Set method.power=2")
    new, old = _comparable(new, old)
    with torch.autocast(new.device.type, enabled=False):
        gap = new - old if one_sided else (new - old).abs()
        cost = torch.relu(gap - margin).pow(power)
        if top_k is None and exclude is None:
            return cost.mean(-1)
        counted = _counted(old, top_k, exclude)
        return torch.where(counted, cost, 0.0).sum(-1) / counted.sum(-1).clamp(min=1)


def _counted(old: Tensor, top_k: int | None, exclude: Tensor | None) -> Tensor:
    columns = torch.arange(old.shape[1], device=old.device)
    if exclude is None:
        left = torch.ones_like(old, dtype=torch.bool)
    else:
        _check_length(exclude, len(old), "exclude")
        left = columns != exclude.unsqueeze(1)
    if top_k is None:
        return left
    most = old.shape[1] - (exclude is not None)
    if not 1 <= top_k <= most:
        raise ValueError(
            f"`top_k` must be between 1 and the {most} classes that count, got {top_k}. Set method.top_k=1"
        )
    chosen = old.masked_fill(~left, -torch.inf).topk(top_k, -1).indices
    return torch.zeros_like(left).scatter_(1, chosen, True)


def _check_length(values: Tensor, number: int, name: str) -> None:
    if values.shape != (number,):
        raise ValueError(f"`{name}` must have one value per sample, shape ({number},), got {tuple(values.shape)}")


def _comparable(new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    if new.ndim != 2 or new.shape != old.shape:
        raise ValueError(
            f"outputs must have the same shape (B, C), got {tuple(new.shape)} of the new and {tuple(old.shape)} of the "
            "old model. Select the classes that both know, with SharedClasses"
        )
    dtype = torch.promote_types(torch.promote_types(new.dtype, old.dtype), torch.float32)
    return new.to(dtype), old.to(dtype)
