"""The rows of a kernel that one process computes, and how the panels of all become the whole."""

from dataclasses import dataclass

from torch import Tensor

from lqf_lightning.linear.kernel_layers import KernelLayer
from lqf_lightning.linear.layer_gram import LayerGram
from lqf_lightning.linear.layer_records import Record
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.sample_layout import SampleLayout


@dataclass
class KernelPanel:
    """Inner products of the samples of this process with all training samples, in the order process by process.

    Attributes:
        rows: Samples of the rows.
        columns: Training samples.
        coupled: Rows per sample.
        matrix: (blocks, own samples * coupled, training samples * coupled).
        square: Whether the rows are the training samples; every product of two of them is then taken once only.
    """

    rows: SampleLayout
    columns: SampleLayout
    coupled: int
    matrix: Tensor
    square: bool

    def add(self, gram: LayerGram, own: Record, other: Record, source: int) -> None:
        """Add a layer's products with the training samples of one process.

        Args:
            gram: The layer.
            own: Samples of the rows.
            other: Training samples of that process.
            source: That process.
        """
        span = self.columns.span(source)
        out = self.matrix[:, :, span.start * self.coupled : span.stop * self.coupled]
        rank = self.rows.rank
        if self.square and source == rank:
            gram.add_to(out, own)
        elif not self.square or _takes(rank, source, len(self.columns.counts)):
            gram.add_to(out, own, other)

    def gather(self, reducer: Reducer) -> Tensor:
        """Bring the panels of all processes together.

        Args:
            reducer: Speaks to the other processes.

        Returns:
            (blocks, n * coupled, m * coupled), samples by ascending index, the same on every process.
        """
        if self.square:
            self._halve_own()
        blocks, k = len(self.matrix), self.coupled
        whole = self.matrix.view(blocks, self.rows.own, k, self.columns.total, k)
        if not bool((self.columns.order[1:] > self.columns.order[:-1]).all()):
            whole = whole.index_select(3, self.columns.order.to(whole.device))
        if reducer.world_size > 1 or not bool((self.rows.order[1:] > self.rows.order[:-1]).all()):
            index = self.rows.own_index.to(whole.device)
            rows, _ = reducer.gather_rows(whole.transpose(0, 1).contiguous(), index)
            whole = rows.transpose(0, 1)
        result = whole.reshape(blocks, self.rows.total * k, self.columns.total * k)
        return result + result.mT if self.square else result

    def _halve_own(self) -> None:
        # What lies below the diagonal of the own block is undefined; the diagonal itself will be added twice.
        span = self.columns.span(self.rows.rank)
        own = self.matrix[:, :, span.start * self.coupled : span.stop * self.coupled]
        own.copy_(own.triu())
        own.diagonal(dim1=1, dim2=2).mul_(0.5)


def exchange(
    record: Record | None, layer: KernelLayer, like: Record, samples: int, source: int, reducer: Reducer
) -> Record:
    """Give every process the record of one of them.

    Args:
        record: On that process its record.
        layer: The layer, for the sizes.
        like: Some record of this process, for type, device and number of cotangents.
        samples: Number of samples of that process.
        source: That process.
        reducer: Speaks to the other processes.

    Returns:
        The record.
    """
    if record is None:
        record = Record.empty(layer, samples, like.deltas.shape[1], like.deltas)
    if reducer.world_size > 1:
        for tensor in (record.inputs, record.deltas):
            if tensor.numel():
                reducer.broadcast_(tensor, source)
    return record


def _takes(rank: int, source: int, world_size: int) -> bool:
    # Of the two processes that could take a product, the one that has the other ahead of it, at most half way round.
    ahead = (source - rank) % world_size
    return 2 * ahead < world_size or (2 * ahead == world_size and rank < source)
