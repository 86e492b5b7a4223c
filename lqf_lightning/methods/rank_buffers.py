"""Buffers (batch-norm statistics) of a model that DistributedDataParallel wraps."""

import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel


def agree_on_buffers(wrapped: nn.Module | None, differ: bool) -> None:
    """Give all ranks the buffers of rank 0, once, and keep `forward` free of collective calls.

    DDP broadcasts buffers at every forward, in evaluation too: with uneven shards the ranks would wait for broadcasts
    that never come. One broadcast at the start of evaluation replaces them.

    Args:
        wrapped: What the strategy runs; anything but DDP is left alone.
        differ: Whether the ranks may hold different buffers.
    """
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_forward_param_sync = False
        for buffer in wrapped.module.buffers() if differ else ():
            dist.broadcast(buffer, 0)


def broadcast_buffers_in_forward(wrapped: nn.Module | None, wanted: bool) -> None:
    """Let DDP broadcast buffers at every forward, or not.

    Args:
        wrapped: What the strategy runs; anything but DDP is left alone.
        wanted: Whether training changes buffers.
    """
    if isinstance(wrapped, DistributedDataParallel):
        wrapped.require_forward_param_sync = wanted
