"""Standard normal numbers that are the same on every rank and device, and that only their seed can bring back."""

from collections.abc import Mapping
from hashlib import shake_256

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
_BITS = 52  # of a number: its half steps are exact in double precision, so that none becomes 0 or 1


def standard_normal(like: Mapping[str, Tensor], seed: int) -> Tensors:
    """Draw independent standard normal numbers in double precision on the CPU.

    The numbers hide weights, so they come from the output of a cryptographic hash (SHAKE-256) of the *whole* seed by
    the inverse of the normal distribution function. A generator of torch takes 32 bits of a seed, which can be tried
    out one by one, and the state of such a generator follows from what it has drawn.

    Args:
        like: Weights by parameter name.
        seed: Of the draw, any whole number; every bit of it counts. Every parameter has numbers of its own, from the
            seed and its name.

    Returns:
        Numbers by parameter name.

    Example:
        >>> import torch
        >>> both = standard_normal({"a": torch.zeros(2), "b": torch.zeros(2)}, seed=0)
        >>> torch.equal(both["b"], standard_normal({"b": torch.zeros(2)}, seed=0)["b"])
        True
    """
    drawn = {}
    for name, entry in like.items():
        stream = bytearray(shake_256(f"{seed}:{name}".encode()).digest(8 * entry.numel()))
        lots = torch.frombuffer(stream, dtype=torch.int64) if stream else torch.zeros(0, dtype=torch.int64)
        steps = (lots >> (64 - _BITS)) + 2 ** (_BITS - 1)  # 0 to 2^52 - 1
        drawn[name] = torch.special.ndtri((steps.double() + 0.5) / 2**_BITS).reshape(entry.shape)
    return drawn
