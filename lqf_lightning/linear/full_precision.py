"""Curvature and start-up checks in the precision that they claim."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep convolutions and products of a GPU from rounding float32 to TF32 (10 bits).

    TF32 is the default of cuDNN's convolutions. Training may use it; factors that are inverted, and checks whose
    tolerances are those of float32, may not.

    Yields:
        Nothing.

    Example:
        >>> import torch
        >>> with full_precision():
        ...     torch.backends.cudnn.allow_tf32
        False
    """
    convolutions, products = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    try:
        yield
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = convolutions, products
