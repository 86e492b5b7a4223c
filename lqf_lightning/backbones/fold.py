"""Batch normalization that only scales and shifts becomes part of the convolution before it."""

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqf_lightning.linear.batch_norm import FrozenNorm, NormConstants
from lqf_lightning.linear.fold_plan import plan_folding

_Layer = nn.Conv1d | nn.Conv2d | nn.Conv3d | nn.Linear


@torch.no_grad()
def fold_batch_norm(model: nn.Module, example: Tensor) -> int:
    """Fold every evaluation-mode BatchNorm into the convolution that feeds it; the function stays the same.

    The pairs are found by running the network once, so any ``forward`` will do. What follows a normalization in the
    same module (timm's ``BatchNormAct2d``) stays under its name. A BatchNorm behind anything else stays as it is.

    Args:
        model: A network in eval mode, changed in place; new biases require a gradient.
        example: Images (B, 3, H, W) to find the pairs with, and to check the result.

    Returns:
        Number of BatchNorms folded.

    Raises:
        ValueError: If the network is in training mode or has no such pair.
        RuntimeError: If the folded network computes something else, because it uses a convolution's output twice.
    """
    if model.training:
        raise ValueError("BatchNorm can be folded in eval mode only: call model.eval() first")
    before = model(example)
    pairs = plan_folding(model, example).pairs
    if not pairs:
        raise ValueError(
            "got backbone.fold_batch_norm=true, but no BatchNorm of the network follows a convolution. Set "
            "backbone.fold_batch_norm=false."
        )
    for layer_name, norm_name in pairs:
        layer, norm = cast(_Layer, model.get_submodule(layer_name)), cast(_BatchNorm, model.get_submodule(norm_name))
        constants = NormConstants(norm, layer.bias)
        weight = layer.weight
        scale = constants.scale.view(-1, *[1] * (weight.ndim - 1))
        weight.copy_(scale * weight)
        layer.bias = nn.Parameter(constants.shift.to(weight.dtype))
        model.set_submodule(norm_name, FrozenNorm(norm, absorbed=True))
    after = model(example)
    tolerance = 1e3 * torch.finfo(before.dtype).eps * before.abs().max()
    if not (after - before).abs().max() <= tolerance:
        raise RuntimeError(
            "the network computes something else after folding: it uses the output of a convolution beside its "
            "BatchNorm. Set backbone.fold_batch_norm=false."
        )
    return len(pairs)
