"""Which process holds which sample, and where it stands in a result that all of them share."""

from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.reducer import Reducer


@dataclass(frozen=True)
class SampleLayout:
    """Samples that are spread over processes, each counted once.

    Attributes:
        index: Global index of every sample (n,), ascending: the order of results.
        counts: Number of samples that each process answers for.
        keep: Positions, among all samples of this process, of those that it answers for, ascending.
        order: Where the samples of the result stand if they are lined up process by process (n,).
        rank: This process.
    """

    index: Tensor
    counts: tuple[int, ...]
    keep: Tensor
    order: Tensor
    rank: int

    @property
    def total(self) -> int:
        """Number of samples n over all processes."""
        return len(self.index)

    @property
    def own(self) -> int:
        """Number of samples that this process answers for."""
        return self.counts[self.rank]

    @property
    def own_index(self) -> Tensor:
        """Global index of the samples of this process, in the order in which it holds them."""
        return self.index[torch.argsort(self.order)][self.span(self.rank)]

    def span(self, rank: int) -> slice:
        """Places of the samples of a process in the line-up process by process.

        Args:
            rank: The process.

        Returns:
            A slice of range(n).
        """
        start = sum(self.counts[:rank])
        return slice(start, start + self.counts[rank])


def lay_out_samples(count: int, index: Tensor | None, reducer: Reducer) -> SampleLayout:
    """Agree on who answers for which sample; repeated ones, which padded samplers produce, go to the lowest rank.

    Args:
        count: Number of samples that this process holds.
        index: Their global index (count,), int64; None numbers the samples of a single process.
        reducer: Speaks to the other processes.

    Returns:
        The layout, the same on every process but for `keep` and `rank`.

    Raises:
        ValueError: There are several processes and no index, or it does not match the samples.

    Example:
        >>> import torch
        >>> layout = lay_out_samples(4, torch.tensor([7, 2, 7, 5]), Reducer())
        >>> layout.index.tolist(), layout.keep.tolist(), layout.order.tolist()
        ([2, 5, 7], [0, 1, 3], [1, 2, 0])
    """
    if index is None and reducer.world_size > 1:
        raise ValueError(
            f"{reducer.world_size} processes share the samples: give the global index of those that each of them holds"
        )
    index = torch.arange(count) if index is None else index.detach()
    if index.shape != (count,) or index.is_floating_point():
        raise ValueError(f"expected one whole number per sample ({count},), got {index.dtype} {tuple(index.shape)}")
    place = torch.arange(count, device=index.device)
    owners, ascending = reducer.gather_rows(torch.stack([torch.full_like(place, reducer.rank), place], 1), index.long())
    owners, ascending = owners.cpu(), ascending.cpu()
    counts = torch.bincount(owners[:, 0], minlength=reducer.world_size)
    # The place of a sample among the kept ones of its process, which keep the order in which they are held.
    lined_up = owners[:, 0] * (int(owners[:, 1].max()) + 1 if len(owners) else 1) + owners[:, 1]
    order = torch.empty_like(lined_up)
    order[torch.argsort(lined_up)] = torch.arange(len(lined_up))
    keep = owners[owners[:, 0] == reducer.rank, 1].sort().values
    return SampleLayout(ascending, tuple(counts.tolist()), keep, order, reducer.rank)
