"""Batches of inputs that are walked through several times, each sample once."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.linear.kernel_store import checksum, checksum_of
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.sample_layout import SampleLayout, lay_out_samples

Watch = Callable[[Any], Iterable[Any]]


@dataclass(frozen=True)
class SampleStream:
    """The samples of this process.

    Attributes:
        batches: Inputs (B, ...), the same every time.
        layout: Who answers for which sample.
        like: Gives device and type.
        watch: Wraps the batches.
        first: The first batch of any size, None if there is no sample.
        sums: Checksum of every sample that this process holds; empty if nobody asked.
    """

    batches: Iterable[Tensor]
    layout: SampleLayout
    like: Tensor
    watch: Watch
    first: Tensor | None
    sums: Tensor

    @classmethod
    def of(
        cls, batches: Iterable[Tensor], index: Tensor | None, like: Tensor, reducer: Reducer, watch: Watch, check: bool
    ) -> "SampleStream":
        """Count the samples and agree with the other processes on who answers for which.

        Args:
            batches: Inputs (B, ...), the same every time.
            index: Global index of the samples of this process; None numbers those of a single process.
            like: Gives device and type.
            reducer: Speaks to the other processes.
            watch: Wraps the batches.
            check: Whether checksums are wanted.

        Returns:
            The stream.

        Raises:
            TypeError: The batches can be walked through only once.
        """
        if isinstance(batches, Iterator):
            raise TypeError(
                f"batches are a {type(batches).__name__}, which is spent after one pass, and there are several; give a "
                "list or a data loader without shuffling"
            )
        count, first, sums = 0, None, [torch.zeros(0, dtype=torch.int64)]
        for x in batches:
            count += len(x)
            first = _place(x[:2], like) if first is None and len(x) else first
            if check:
                sums.append(checksum(x).cpu())
        layout = lay_out_samples(count, None if index is None else index.to(like.device), reducer)
        return cls(batches, layout, like, watch, first, torch.cat(sums))

    def content(self, reducer: Reducer) -> Tensor:
        """Sum up which samples there are on all processes.

        Args:
            reducer: Speaks to the other processes.

        Returns:
            A number that depends on content and index, but not on who holds what.
        """
        own = self.layout.own_index.to(self.like.device)
        sums, _ = reducer.gather_rows(self.sums[self.layout.keep].to(self.like.device), own)
        return torch.tensor([checksum_of([sums, self.layout.index])])

    def parts(self, size: int) -> Iterator[tuple[Tensor, int]]:
        """Walk through the samples that this process answers for.

        Args:
            size: Most samples at a time.

        Yields:
            Inputs (B, ...) and the position of the first of them.

        Raises:
            ValueError: There are fewer samples than the first time.
        """
        seen = kept = 0
        for x in self.watch(self.batches):
            mine = self.layout.keep[(self.layout.keep >= seen) & (self.layout.keep < seen + len(x))] - seen
            seen += len(x)
            chosen = x if len(mine) == len(x) else x[mine.to(x.device)]
            for part in chosen.split(size) if len(chosen) else ():
                yield _place(part, self.like), kept
                kept += len(part)
        if kept != self.layout.own:
            raise ValueError(f"the batches held {kept} samples, and {self.layout.own} when they were counted")


def _place(x: Tensor, like: Tensor) -> Tensor:
    # A tensor of inference mode cannot be saved for a backward pass.
    x = x.clone() if x.is_inference() else x.detach()
    return x.to(like.device, like.dtype) if x.is_floating_point() else x.to(like.device)
