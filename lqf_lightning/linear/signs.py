"""Random signs that belong to a sample, whatever batch or process it is in."""

import torch
from torch import Tensor

# SplitMix64 (Steele, Lea and Flood, OOPSLA 2014), as signed 64-bit integers that wrap around.
_GOLDEN, _FIRST, _SECOND = (0x9E3779B97F4A7C15 - 2**64, 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64)


def sample_signs(x: Tensor, width: int, seed: int) -> Tensor:
    """Draw independent signs for every sample from its own content.

    Equal samples get equal signs; any change of one gives it new ones. The draw depends on neither the order nor the
    grouping of samples, so estimates made with it do not depend on the number of processes.

    Args:
        x: Samples (B, ...), floating point.
        width: Number of signs C per sample.
        seed: Another seed gives other signs.

    Returns:
        Values -1 and +1 (B, C), in the type of `x`.

    Example:
        >>> import torch
        >>> x = torch.randn(5, 3)
        >>> bool((sample_signs(x, 4, seed=0)[2:] == sample_signs(x[2:], 4, seed=0)).all())
        True
    """
    words = x.detach().flatten(1).double().contiguous().view(torch.int64)
    position = torch.arange(words.shape[1], device=x.device, dtype=torch.int64)
    content = _mix(words + _GOLDEN * (position + 1)).sum(1)  # integers add exactly, in any order
    column = torch.arange(width, device=x.device, dtype=torch.int64)
    bits = _mix(content[:, None] + _mix(column * _GOLDEN + seed))
    return 1 - 2 * (bits & 1).to(x.dtype)


def _mix(value: Tensor) -> Tensor:
    value = (value ^ _shift(value, 30)) * _FIRST
    value = (value ^ _shift(value, 27)) * _SECOND
    return torch.bitwise_xor(value, _shift(value, 31))


def _shift(value: Tensor, bits: int) -> Tensor:
    # A logical shift: torch's copies the sign.
    return torch.bitwise_and(value >> bits, 2 ** (64 - bits) - 1)
