"""A network with other statistics for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def with_buffers(network: nn.Module, buffers: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Give a network other buffers, and its own back at the end, whatever happens.

    Args:
        network: The network.
        buffers: Some of its buffers by name; None leaves them all.

    Yields:
        Nothing.
    """
    known = dict(network.named_buffers())
    own = {name: known[name].clone() for name in buffers or {}}
    try:
        _assign(known, buffers or {})
        yield
    finally:
        _assign(known, own)


def _assign(known: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in buffers.items():
            known[name].copy_(buffer)
