"""A seed of noise that nobody can guess, the same on every rank."""

import secrets

import torch

from lqf_lightning.linear import current_reducer

_HALF = 62  # bits that a whole number of a tensor holds with room for its sign


def secret_seed(given: int | None, device: torch.device) -> int:
    """Draw a seed of 124 bits from the randomness of the system; all ranks have to call this together.

    Args:
        given: A seed to take instead, for experiments; None: a secret one.
        device: Where process groups expect what they send.

    Returns:
        The seed of the first rank.
    """
    drawn = secrets.randbits(2 * _HALF) if given is None else given
    halves = [drawn >> _HALF, drawn & (2**_HALF - 1)]
    high, low = current_reducer().broadcast_(torch.tensor(halves, dtype=torch.int64, device=device)).tolist()
    return int(high << _HALF | low)
