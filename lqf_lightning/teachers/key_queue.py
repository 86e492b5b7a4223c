"""Keys of the last batches, which the next batch is told apart from."""

from typing import Any, Self

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F


class KeyQueue(nn.Module):
    r"""The last K keys of all ranks: a ring, first in first out (He et al., Momentum Contrast, CVPR 2020, section 3.2).

    It begins as unit vectors of Gaussian noise from a generator of its own, so that all ranks begin alike and no other
    random number moves. `known` leaves the noise out: told from noise, all images move to one place of the sphere
    before there is another image to be told from, and are slow to come apart again. Every step overwrites the oldest
    keys with those of all ranks, in the order of (rank, row): the queue is the same on all ranks, without being
    broadcast. Name `BUFFERS` among those that DDP ignores, or it sends the whole queue in every forward pass. The
    position is kept in the `state_dict` and is no buffer.

    Args:
        size: Number of keys K.
        width: Length of a key D.
        seed: Of the noise, the same on all ranks.

    Attributes:
        keys: Keys (K, D). The tensor is written in place and never replaced.
        labels: Their classes (K,), -1 where unknown.
        position: Row of the oldest key, which the next one overwrites.
        filled: How many of the keys are no noise any more: the first ones.

    Raises:
        ValueError: `size` or `width` is not positive.

    Example:
        >>> queue = KeyQueue(size=3, width=1)
        >>> for key in (7.0, 8.0, 9.0, 10.0):
        ...     queue.enqueue(torch.tensor([[key]]))
        >>> queue.keys.tolist(), queue.position
        ([[10.0], [8.0], [9.0]], 1)
        >>> queue = KeyQueue(size=3, width=1)
        >>> queue.enqueue(torch.tensor([[7.0]]))
        >>> [tensor.tolist() for tensor in queue.known()]
        [[[7.0]], [-1]]
    """

    BUFFERS = ("keys", "labels")
    keys: Tensor
    labels: Tensor

    def __init__(self, size: int, width: int, seed: int = 0) -> None:
        super().__init__()
        if size < 1 or width < 1:
            raise ValueError(
                f"a queue needs at least one key of at least one number, got size {size} and width {width}. "
                "Set method.queue_size=4096"
            )
        noise = torch.randn(size, width, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
        self.register_buffer("keys", F.normalize(noise, dim=1))
        self.register_buffer("labels", torch.full((size,), -1, dtype=torch.int64))
        self.position = self.filled = 0

    def known(self) -> tuple[Tensor, Tensor]:
        """The keys that were put in, without the noise before them.

        Returns:
            Keys (n, D) and their classes (n,), n at most K; no rows at first.
        """
        return self.keys[: self.filled], self.labels[: self.filled]

    def refuse_batch(self, global_batch: int) -> None:
        """Check that batches fill the queue without remainder, so that a batch is in it as a whole or not at all.

        Args:
            global_batch: Samples per step of all ranks together.

        Raises:
            ValueError: They do not.
        """
        size = len(self.keys)
        if global_batch < 1 or size % global_batch:
            below = size // max(global_batch, 1) * global_batch
            fitting = " or ".join(str(number) for number in (below, below + global_batch) if number > 0)
            raise ValueError(
                f"a queue of {size} keys is not a multiple of the {global_batch} samples that all processes together "
                f"put in at every step. Set method.queue_size={fitting or size}, or a data.batch_size that divides it"
            )

    @torch.no_grad()
    def enqueue(self, keys: Tensor, labels: Tensor | None = None) -> None:
        """Put in the keys of a step, for the oldest ones. Every rank calls this, with equally many keys.

        Args:
            keys: Keys of this rank (B, D).
            labels: Their classes (B,), -1 where unknown; None: all unknown, then on every rank.

        Raises:
            ValueError: The shapes do not fit, or the queue is not a multiple of the keys of all ranks.
        """
        if keys.ndim != 2 or keys.shape[1] != self.keys.shape[1]:
            raise ValueError(f"keys must be of shape (B, {self.keys.shape[1]}), got {tuple(keys.shape)}")
        if labels is not None and labels.shape != (len(keys),):
            raise ValueError(f"expected one label per key, shape ({len(keys)},), got {tuple(labels.shape)}")
        self.refuse_batch(len(keys) * _world_size())
        self._overwrite(self.keys, keys)
        if labels is None:
            labels = torch.full((len(keys),), -1, device=self.labels.device)
        number = self._overwrite(self.labels, labels)
        self.position = (self.position + number) % len(self.keys)
        self.filled = min(self.filled + number, len(self.keys))

    def _overwrite(self, ring: Tensor, rows: Tensor) -> int:
        # A run that was resumed with another batch size may stand where a batch reaches over the end of the ring.
        gathered = _gather(rows.detach().to(ring))
        end = min(len(gathered), len(ring) - self.position)
        ring[self.position : self.position + end].copy_(gathered[:end])
        ring[: len(gathered) - end].copy_(gathered[end:])
        return len(gathered)

    def get_extra_state(self) -> Tensor:
        """Position and number of keys, for the `state_dict`.

        Returns:
            Two integers, as a tensor: all of a `state_dict` are tensors.
        """
        return torch.tensor([self.position, self.filled])

    def set_extra_state(self, state: Tensor) -> None:
        """Go on where a `state_dict` was.

        Args:
            state: What `get_extra_state` returned.
        """
        self.position, self.filled = state.tolist()

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        # Keys of half precision would be compared with the current one, which is of single precision.
        def keep_width(tensor: Tensor) -> Tensor:
            moved: Tensor = fn(tensor)
            return tensor.to(moved.device) if moved.is_floating_point() and moved.dtype.itemsize < 4 else moved

        super()._apply(keep_width, recurse)  # type: ignore[no-untyped-call]  # torch gives this hook no types
        return self


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _gather(rows: Tensor) -> Tensor:
    # Rows of all ranks, in the order of ranks: a `Reducer` orders by index, which keys of two steps may share.
    world_size = _world_size()
    if world_size == 1:
        return rows
    parts = [torch.empty_like(rows, memory_format=torch.contiguous_format) for _ in range(world_size)]
    dist.all_gather(parts, rows.contiguous())
    return torch.cat(parts)
