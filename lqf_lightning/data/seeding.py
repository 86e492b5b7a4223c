"""Random numbers that depend on what they are for and on nothing else."""

import random
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b

import numpy as np
import torch


def mix_seed(*parts: int) -> int:
    """Mix several integers into one seed; neighboring inputs give unrelated seeds.

    Args:
        parts: For instance the seed of the run, the epoch and the index of the sample.

    Returns:
        A number below 2**63.

    Example:
        >>> mix_seed(0, 1) == mix_seed(0, 1), mix_seed(0, 1) == mix_seed(1, 0)
        (True, False)
    """
    digest = blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed the CPU generators of torch, NumPy and Python, and put them back afterwards.

    Args:
        seed: A number below 2**63.

    Yields:
        Nothing; the body draws the same numbers every time.
    """
    state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.default_generator.manual_seed(seed)
        yield
    finally:
        random.setstate(state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)
