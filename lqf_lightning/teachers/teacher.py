"""What all teachers promise."""

from typing import Any, Self

import torch
from torch import Tensor, nn


class Teacher(nn.Module):
    """A network that answers and does not learn by gradients.

    It stays in eval mode whatever its owner does, so that its answer on an image depends on no other image of the
    batch; no gradient reaches it; its outputs have at least single precision.
    """

    def train(self, mode: bool = True) -> Self:
        """Stay in eval mode.

        Args:
            mode: Not heeded.

        Returns:
            The teacher itself.
        """
        return super().train(False)


def at_least_single(outputs: Any) -> Any:
    """Detach what a network returns, and widen what is narrower than single precision.

    Args:
        outputs: A tensor, or a tuple (named or not), list or dictionary of such.

    Returns:
        The same, detached.

    Example:
        >>> at_least_single((torch.ones(1, dtype=torch.bfloat16), torch.ones(1).double()))
        (tensor([1.]), tensor([1.], dtype=torch.float64))
    """
    if isinstance(outputs, Tensor):
        wide = outputs.to(wide_type(outputs.dtype)) if outputs.is_floating_point() else outputs
        return wide.detach()
    if isinstance(outputs, tuple) and hasattr(outputs, "_fields"):
        return type(outputs)(*map(at_least_single, outputs))
    if isinstance(outputs, (tuple, list)):
        return type(outputs)(map(at_least_single, outputs))
    if isinstance(outputs, dict):
        return {name: at_least_single(value) for name, value in outputs.items()}
    return outputs


def wide_type(dtype: torch.dtype) -> torch.dtype:
    """Single precision, or the type itself if it is wider.

    Args:
        dtype: A floating-point type.

    Returns:
        A type of at least 32 bits.
    """
    return torch.promote_types(dtype, torch.float32)
