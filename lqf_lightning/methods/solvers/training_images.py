"""The images of this rank's samples, read anew in every pass."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader

from lqf_lightning.data import Batch
from lqf_lightning.methods.solvers.training_table import on_device

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF


class TrainingImages:
    """Batches of images as they are evaluated; nothing is kept, so that their number is not limited by memory.

    Args:
        method: The method, attached to a trainer.
        loader: Samples of this rank; None takes the training samples.
    """

    def __init__(self, method: "LQF", loader: DataLoader[Batch] | None = None) -> None:
        self.method = method
        self.loader = method.solver.data_module().fixed_train_dataloader() if loader is None else loader

    def __len__(self) -> int:
        """Count the batches, for progress bars.

        Returns:
            Their number, an empty one of a rank without samples included.
        """
        return len(self.loader)

    def __iter__(self) -> Iterator[Tensor]:
        """Walk through the images.

        Yields:
            Inputs (B, ...), B at least 1.
        """
        for batch in self.loader:
            if len(batch.target):
                yield on_device(self.method, batch).input
