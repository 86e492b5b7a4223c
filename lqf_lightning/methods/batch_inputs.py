"""The images of batches, without what comes along."""

from collections.abc import Iterable, Iterator

from torch import Tensor

from lqf_lightning.data import Batch


class BatchInputs(Iterable[Tensor]):
    """The images of a loader's batches, as often as they are walked through.

    Args:
        loader: Gives batches.
    """

    def __init__(self, loader: Iterable[Batch]) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Tensor]:
        """Walk through the loader.

        Yields:
            Images (B, 3, H, W).
        """
        for batch in self.loader:
            yield batch.input
