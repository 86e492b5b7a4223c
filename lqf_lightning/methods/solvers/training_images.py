"""The images of this rank's training samples, read anew in every pass."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from torch import Tensor

from lqf_lightning.methods.solvers.training_table import on_device

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF


class TrainingImages:
    """Batches of images as they are evaluated; nothing is kept, so that their number is not limited by memory.

    Args:
        method: The method, attached to a trainer.
    """

    def __init__(self, method: "LQF") -> None:
        self.method, self.loader = method, method.solver.data_module().fixed_train_dataloader()

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
