"""How results of several processes become one: the only door through which distribution enters the maths.

Functions of this package take a reducer and call it where a sum over the data is complete. The plain `Reducer` is the
single process and does nothing; `DistributedReducer` speaks to the default group of `torch.distributed`.
"""

import torch
import torch.distributed as dist
from torch import Tensor


class Reducer:
    """The single process: every sum is already complete.

    Attributes:
        rank: Position of this process.
        world_size: Number of processes.

    Example:
        >>> import torch
        >>> rows, index = Reducer().gather_rows(torch.tensor([[3.0], [1.0], [3.0]]), torch.tensor([7, 2, 7]))
        >>> rows.tolist(), index.tolist()
        ([[1.0], [3.0]], [2, 7])
    """

    rank: int = 0
    world_size: int = 1

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all processes, in place.

        Args:
            tensor: Same shape and type everywhere.

        Returns:
            The tensor itself.
        """
        return tensor

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite a tensor with that of one process.

        Args:
            tensor: Same shape and type everywhere.
            source: Process whose values win.

        Returns:
            The tensor itself.
        """
        return tensor

    def gather_rows(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the rows of all processes together, sorted, each index once.

        Args:
            rows: Rows (B, ...); their number may differ between processes and be zero.
            index: Index of every row (B,), int64.

        Returns:
            Rows (N, ...) and their indices (N,), ascending. Of rows with the same index, which padded samplers
            produce, the first is kept.

        Raises:
            ValueError: If the lengths differ.
        """
        if len(rows) != len(index):
            raise ValueError(f"got {len(rows)} rows and {len(index)} indices, expected one index for every row")
        ordered, order = torch.sort(index, stable=True)
        first = torch.ones_like(ordered, dtype=torch.bool)
        first[1:] = ordered[1:] != ordered[:-1]
        return rows[order[first]], ordered[first]


class DistributedReducer(Reducer):
    """The default process group of `torch.distributed`.

    Raises:
        RuntimeError: If no process group has been started.
    """

    def __init__(self) -> None:
        if not (dist.is_available() and dist.is_initialized()):
            raise RuntimeError("no process group: call torch.distributed.init_process_group first, or use Reducer()")
        self.rank = dist.get_rank()
        self.world_size = dist.get_world_size()

    def sum_(self, tensor: Tensor) -> Tensor:
        """Add a tensor over all processes, in place.

        Args:
            tensor: Same shape and type everywhere.

        Returns:
            The tensor itself.
        """
        if tensor.is_contiguous():
            dist.all_reduce(tensor)
            return tensor
        whole = tensor.contiguous()
        dist.all_reduce(whole)
        return tensor.copy_(whole)

    def broadcast_(self, tensor: Tensor, source: int = 0) -> Tensor:
        """Overwrite a tensor with that of one process.

        Args:
            tensor: Same shape and type everywhere.
            source: Process whose values win.

        Returns:
            The tensor itself.
        """
        whole = tensor.contiguous()
        dist.broadcast(whole, source)
        return tensor if whole is tensor else tensor.copy_(whole)

    def gather_rows(self, rows: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Bring the rows of all processes together, sorted, each index once.

        Args:
            rows: Rows (B, ...); their number may differ between processes and be zero.
            index: Index of every row (B,), int64.

        Returns:
            Rows (N, ...) and their indices (N,), ascending, the same on every process. Of rows with the same index
            the one of the lowest rank is kept.

        Raises:
            ValueError: If the lengths differ.
        """
        if len(rows) != len(index):
            raise ValueError(f"got {len(rows)} rows and {len(index)} indices, expected one index for every row")
        counts = torch.zeros(self.world_size, dtype=torch.int64, device=rows.device)
        counts[self.rank] = len(rows)
        lengths = [int(count) for count in self.sum_(counts)]
        gathered = self._gather(rows, lengths)
        return super().gather_rows(gathered, self._gather(index.to(rows.device), lengths))

    def _gather(self, rows: Tensor, lengths: list[int]) -> Tensor:
        # all_gather wants equal shapes, so every process sends as many rows as the longest has.
        padded = rows.new_zeros(max(lengths), *rows.shape[1:])
        padded[: len(rows)] = rows
        parts = [torch.empty_like(padded) for _ in lengths]
        dist.all_gather(parts, padded)
        return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def current_reducer() -> Reducer:
    """The reducer of this process as it stands: distributed if a process group is running.

    Returns:
        A DistributedReducer where `torch.distributed` is initialized, else the single process.
    """
    running = dist.is_available() and dist.is_initialized()
    return DistributedReducer() if running else Reducer()
