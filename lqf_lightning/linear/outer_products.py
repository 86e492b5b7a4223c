"""Dense and convolutional layers as what their gradients are: sums over positions of outer products."""

import math

import torch.nn.functional as F
from torch import Tensor, nn


def is_kronecker_layer(module: nn.Module) -> bool:
    """Tell whether the gradient of a module is a sum of outer products of inputs and cotangents.

    Args:
        module: Any module.

    Returns:
        True for `Linear`, `Conv2d`, and timm's `Linear`, which is the same, and `Conv2dSame`, which only pads in
        another way. Not for subclasses that transform their weight, nor for the output layer of
        `nn.MultiheadAttention`, which never runs as a module.
    """
    name, run = type(module).__name__, type(module).forward
    if isinstance(module, nn.Linear):
        if name == "Linear" and type(module).__module__.startswith("timm."):
            return True
        return run is nn.Linear.forward and name != "NonDynamicallyQuantizableLinear"
    return isinstance(module, nn.Conv2d) and (run is nn.Conv2d.forward or name == "Conv2dSame")


def split_inputs(module: nn.Module, x: Tensor, positions: int) -> Tensor:
    """Cut the input of a layer into the vectors that its weight multiplies.

    Args:
        module: `Linear` or `Conv2d`.
        x: Input (B, ..., d) or (B, C, H, W).
        positions: Number of output positions.

    Returns:
        Vectors (B, groups, T, d).

    Raises:
        ValueError: If the convolution pads in an unknown way.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x), 1, -1, x.shape[-1])
    own = type(module).forward is nn.Conv2d.forward
    padding = list(module._reversed_padding_repeated_twice) if own else _same_padding(module, x)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = F.unfold(F.pad(x, padding, mode), module.kernel_size, module.dilation, 0, module.stride)
    if patches.shape[-1] != positions:
        raise ValueError(f"cannot tell the padding of {type(module).__name__} for inputs {tuple(x.shape)}")
    return patches.reshape(len(x), module.groups, -1, positions).transpose(2, 3)


def _same_padding(module: nn.Conv2d, x: Tensor) -> list[int]:
    # TensorFlow's rule, which timm's Conv2dSame follows: as many outputs as strides fit, the odd pixel behind.
    padding: list[int] = []
    for axis in (1, 0):
        size, stride = x.shape[2 + axis], module.stride[axis]
        span = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        padding += [total // 2, total - total // 2]
    return padding


def split_outputs(module: nn.Module, delta: Tensor) -> Tensor:
    """Bring the cotangents of a layer's output into the order of `split_inputs`.

    Args:
        module: `Linear` or `Conv2d`.
        delta: Cotangents (B, ..., o) or (B, C, H, W).

    Returns:
        Cotangents (B, groups, T, o).
    """
    if not isinstance(module, nn.Conv2d):
        return delta.reshape(len(delta), 1, -1, delta.shape[-1])
    groups = module.groups
    return delta.reshape(len(delta), groups, delta.shape[1] // groups, -1).transpose(2, 3)


def by_sample(vectors: Tensor, batch: int) -> Tensor:
    """Bring the windows of a sample, which window attention folds into the leading dimension, back together.

    Args:
        vectors: Inputs or cotangents (B W, groups, T, d).
        batch: Number of samples B.

    Returns:
        The same (B, groups, W T, d); unchanged if they do not divide.
    """
    windows, rest = divmod(len(vectors), max(batch, 1))
    if windows <= 1 or rest:
        return vectors
    folded = vectors.reshape(batch, windows, *vectors.shape[1:])
    return folded.transpose(1, 2).flatten(2, 3)
