"""Standard normal numbers that are the same on every rank and device."""

from collections.abc import Mapping
from hashlib import blake2b

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def standard_normal(like: Mapping[str, Tensor], seed: int) -> Tensors:
    """Draw independent standard normal numbers in double precision on the CPU.

    Args:
        like: Weights by parameter name.
        seed: Of the draw. Every parameter has a generator of its own, from the seed and its name.

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
        lot = blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(lot, "little") >> 1)
        drawn[name] = torch.randn(entry.shape, generator=generator, dtype=torch.float64)
    return drawn
