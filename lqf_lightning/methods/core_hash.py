"""A fingerprint of frozen weights, by which anyone can check that training left them alone."""

import struct
from collections.abc import Mapping
from hashlib import sha256

import torch
from torch import Tensor


def core_hash(state: Mapping[str, Tensor]) -> str:
    """SHA-256 over names, shapes and values of weights and buffers.

    Floating-point values are hashed as double precision, which holds all of them exactly: the same network has the same
    hash wherever it lies and in whatever longer type. A single changed bit, the sign of a zero included, changes it.

    Args:
        state: Tensors by name; their order does not matter.

    Returns:
        64 hexadecimal digits.

    Example:
        >>> import torch
        >>> weights = {"fc.weight": torch.tensor([[1.0, 2.0]]), "fc.bias": torch.zeros(1)}
        >>> core_hash(weights)[:16]
        '7ba56c5eedff8b74'
        >>> core_hash(weights) == core_hash({name: value.double() for name, value in weights.items()})
        True
    """
    digest = sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu()
        values = tensor.to(torch.float64 if tensor.is_floating_point() else torch.int64).contiguous().numpy()
        for part in (name.encode(), struct.pack(f"<{tensor.ndim}q", *tensor.shape)):
            digest.update(struct.pack("<q", len(part)) + part)
        digest.update(values.astype(values.dtype.newbyteorder("<"), copy=False).tobytes())
    return digest.hexdigest()
