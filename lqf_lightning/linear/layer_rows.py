"""Gradients of single samples in one layer, from its inputs and the cotangents of its outputs."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqf_lightning.linear.affine_norm import AffineNorm
from lqf_lightning.linear.kernel_layers import KernelLayer
from lqf_lightning.linear.outer_products import by_sample, split_inputs, split_outputs


def layer_vectors(layer: KernelLayer, module: nn.Module, inputs: Tensor, positions: int) -> Tensor:
    """Cut inputs into the vectors that the weight multiplies, a one behind them if the bias is trained.

    Args:
        layer: Its sizes.
        module: The module.
        inputs: Inputs (n, windows, ...).
        positions: Number of positions T of a sample.

    Returns:
        Vectors (n, blocks, T, d), of all blocks.
    """
    count, windows = inputs.shape[:2]
    if layer.weight is None:
        vectors = inputs.new_zeros(count, layer.blocks, positions, 0)
    else:
        vectors = by_sample(split_inputs(module, inputs.flatten(0, 1), positions // windows), count)
    if layer.bias is not None:
        vectors = torch.cat([vectors, vectors.new_ones(*vectors.shape[:-1], 1)], -1)
    return vectors


def layer_cotangents(layer: KernelLayer, module: nn.Module, delta: Tensor, count: int) -> Tensor:
    """Bring the cotangents of an output into the order of its channels.

    Args:
        layer: Its sizes.
        module: The module.
        delta: Cotangents as the output is shaped.
        count: Number of samples n.

    Returns:
        Cotangents (n, channels, T) of the layer's range of channels.
    """
    split = by_sample(split_outputs(module, delta), count)
    return split.transpose(2, 3).flatten(1, 2)[:, layer.start : layer.stop]


def outer_rows(layer: KernelLayer, vectors: Tensor, deltas: Tensor, start: int, stop: int) -> Tensor:
    r"""Sum outer products over positions, :math:`\sum_t \delta_{ct} a_t^T`.

    Args:
        layer: Its sizes.
        vectors: Inputs (n, blocks, T, d), of all blocks.
        deltas: Cotangents (n, V, channels, T) of the layer's range.
        start: First channel of the rows, counted from that of the layer's range.
        stop: Channel behind the last.

    Returns:
        Rows (n, V, (stop - start) * d).
    """
    n, v, _, t = deltas.shape
    chosen, width = deltas[:, :, start:stop], vectors.shape[-1]
    if layer.blocks == 1:
        return (chosen.reshape(n, -1, t) @ vectors[:, 0]).reshape(n, v, -1)
    size = layer.channels // layer.blocks
    vectors = vectors[:, (layer.start + start) // size : (layer.start + stop) // size]
    folded = chosen.reshape(n, v, -1, size, t).transpose(1, 2).flatten(2, 3)
    return (folded @ vectors).reshape(n, -1, v, size * width).transpose(1, 2).reshape(n, v, -1)


def norm_inputs(module: nn.Module, x: Tensor) -> Tensor:
    """Normalize without scale and shift.

    Args:
        module: Batch, layer or group normalization.
        x: Its input.

    Returns:
        What the weight multiplies, channels last.

    Raises:
        TypeError: It is no normalization.
    """
    if isinstance(module, AffineNorm):
        return module.normalize(x).movedim(1, -1)
    if isinstance(module, _BatchNorm):
        return F.batch_norm(x, module.running_mean, module.running_var, eps=module.eps).movedim(1, -1)
    if isinstance(module, nn.GroupNorm):
        return F.group_norm(x, module.num_groups, eps=module.eps).movedim(1, -1)
    if not isinstance(module, nn.LayerNorm):
        raise TypeError(f"expected a normalization, got {type(module).__name__}")
    return F.layer_norm(_channels_last(module, x), module.normalized_shape, eps=module.eps)


def norm_rows(layer: KernelLayer, module: nn.Module, normalized: Tensor, delta: Tensor, count: int) -> Tensor:
    """Sum the gradients of scale and shift over the positions of every sample.

    Args:
        layer: Its names.
        module: The normalization.
        normalized: From `norm_inputs`.
        delta: Cotangents as the output is shaped.
        count: Number of samples n.

    Returns:
        Rows (n, columns): scale, then shift.
    """
    delta = _channels_last(module, delta)
    size = module.get_parameter("weight" if layer.weight else "bias").numel()
    parts = [delta * normalized] if layer.weight else []
    parts += [delta] if layer.bias else []
    return torch.cat([part.reshape(count, -1, size).sum(1) for part in parts], 1)


def _channels_last(module: nn.Module, x: Tensor) -> Tensor:
    # timm's LayerNorm2d normalizes the channels of an image.
    image = not isinstance(module, nn.LayerNorm) or (type(module).__name__ == "LayerNorm2d" and x.ndim == 4)
    return x.movedim(1, -1) if image else x
