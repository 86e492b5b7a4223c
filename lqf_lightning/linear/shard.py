"""Which samples a rank holds, when rows of all of them are needed."""

import torch
from torch import Tensor

from lqf_lightning.linear.reducer import Reducer


class Shard:
    """The samples of this rank among those of all ranks.

    A sample that is held several times, which padded samplers do, counts once in everything that goes through here.

    Args:
        positions: Position of each sample of this rank among all (n_local,), int64.
        samples: Number of samples of all ranks.
        reducer: Sums over ranks; None for a single process.

    Raises:
        ValueError: A position is out of range, or a sample is held by no rank.

    Example:
        >>> import torch
        >>> shard = Shard(torch.tensor([2, 0, 1]), 3)
        >>> shard.spread(torch.tensor([[30.0], [10.0], [20.0]])).tolist()
        [[10.0], [20.0], [30.0]]
    """

    def __init__(self, positions: Tensor, samples: int, reducer: Reducer | None = None) -> None:
        self.positions, self.samples, self.reducer = positions, samples, reducer or Reducer()
        # What is out of range is counted behind the samples: all ranks have to know of it, or some would wait forever.
        slots = torch.where((positions >= 0) & (positions < samples), positions, samples)
        ones = torch.ones(len(positions), dtype=torch.float64, device=positions.device)
        count = torch.zeros(samples + 1, dtype=torch.float64, device=positions.device).index_add_(0, slots, ones)
        outside = int(self.reducer.sum_(count)[samples])
        if outside:
            raise ValueError(f"{outside} positions are out of range: those of {samples} samples lie in [0, {samples})")
        absent = (count[:samples] == 0).nonzero().flatten().tolist()
        if absent:
            raise ValueError(
                f"{len(absent)} of {samples} samples are held by no rank, the first at position {absent[0]}"
            )
        self._share = count[positions].reciprocal().unsqueeze(1)

    def spread(self, rows: Tensor) -> Tensor:
        """Bring the rows of all ranks together.

        Args:
            rows: Rows of this rank's samples (n_local, C).

        Returns:
            Rows of all samples (n, C), double precision, the same on every rank.
        """
        share = self._share.to(rows.device)
        spread = torch.zeros(self.samples, rows.shape[1], dtype=torch.float64, device=rows.device)
        return self.reducer.sum_(spread.index_add_(0, self.positions.to(rows.device), rows.double() * share))

    def own(self, rows: Tensor) -> Tensor:
        """Cut out the rows of this rank's samples, so that sums over ranks count every sample once.

        Args:
            rows: Rows of all samples (n, C).

        Returns:
            Rows (n_local, C), divided by how often the sample is held.
        """
        return rows[self.positions.to(rows.device)] * self._share.to(rows)
