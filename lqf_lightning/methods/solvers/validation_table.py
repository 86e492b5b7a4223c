"""The validation samples of all ranks, where a solver looks at them before training."""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from torch import Tensor
from torch.utils.data import DataLoader

from lqf_lightning.congruence.tradeoff import HeldOutSamples
from lqf_lightning.data import Batch
from lqf_lightning.methods.logit_matching import LogitMatching
from lqf_lightning.methods.solvers.sample_columns import Column, gather_columns, output_at_start
from lqf_lightning.methods.solvers.training_table import fixed_batches

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF


@dataclass(frozen=True)
class ValidationTable:
    """Rows of all validation samples, by ascending index, the same on every rank.

    Attributes:
        samples: Outputs before training, labels, and whether the reference is right.
        own_index: Index of this rank's samples, in the order of its batches.
        loader: Reads their images.
        matching: The reference.
    """

    samples: HeldOutSamples
    own_index: Tensor
    loader: DataLoader[Batch]
    matching: LogitMatching

    @classmethod
    def collect(cls, method: "LQF", matching: LogitMatching) -> "ValidationTable":
        """Evaluate the network and the reference on the validation samples, one pass.

        Args:
            method: The method, attached to a trainer.
            matching: Its reference.

        Returns:
            The table.
        """
        loader = method.solver.data_module().val_dataloader()
        columns = {
            "label": Column.labels(),
            "initial": Column(partial(output_at_start, method), len(method.classes)),
            "prediction": Column(matching.predictions, None),
        }
        own, _, rows = gather_columns(method, fixed_batches(method, loader, "validation samples"), columns)
        position = matching.shared.old_position(rows["label"])
        samples = HeldOutSamples(rows["initial"], rows["label"], rows["prediction"] == position, position >= 0)
        return cls(samples, own, loader, matching)
