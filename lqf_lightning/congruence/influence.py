"""Whether an old classifier understands new features."""

import torch
from torch import Tensor
from torch.nn import functional as F


def influence_loss(features: Tensor, weight: Tensor, bias: Tensor | None, old_target: Tensor) -> Tensor:
    r"""Loss of an old classifier on new features (BCT; Shen et al., Backward-Compatible Representation, CVPR 2020).

    .. math:: \frac1B \sum_{i:\, y_i \text{ known}} CE(W_o\, \varphi_n(x_i)_{1..d_o} + b_o,\; y_i)

    The old classifier sees the first of the new features, as many as it has weights for. Samples of classes that it
    does not know count as 0: dividing by the whole batch keeps the mean over several processes that of one.

    Args:
        features: What enters the head of the new network (B, d_new).
        weight: Weights of the old head (C_old, d_old), frozen.
        bias: Its offsets (C_old,), or None.
        old_target: Class positions of the old model (B,), -1 where it does not know the class.

    Returns:
        A scalar; 0, with a graph, where no class is known. Autocast does not change it.

    Raises:
        ValueError: The features are no vectors, or fewer than the old head needs, or targets do not fit them.

    Example:
        >>> features, weight = torch.tensor([[3.0, 1.0, 7.0]]), torch.tensor([[1.0, 0.0], [0.0, 1.0]])
        >>> round(influence_loss(features, weight, None, torch.tensor([0])).item(), 4)  # log(1 + exp(1 - 3))
        0.1269
    """
    if features.ndim != 2 or old_target.shape != (len(features),):
        raise ValueError(
            f"features must be vectors (B, d) with one class each, got {tuple(features.shape)} and "
            f"{tuple(old_target.shape)}. Set method.influence=0"
        )
    width = weight.shape[1]
    if features.shape[1] < width:
        raise ValueError(
            f"the new network has {features.shape[1]} features, fewer than the {width} that the old head needs. Set "
            "method.influence=0, or backbone.name to a wider network"
        )
    dtype = torch.promote_types(features.dtype, torch.float32)
    frozen = [None if value is None else value.detach().to(dtype) for value in (weight, bias)]
    with torch.autocast(features.device.type, enabled=False):
        outputs = F.linear(features[:, :width].to(dtype), frozen[0], frozen[1])  # type: ignore[arg-type]  # not None
        losses = F.cross_entropy(outputs, old_target.clamp(min=0), reduction="none")
        return torch.where(old_target >= 0, losses, 0.0).sum() / max(len(features), 1)
