"""Counting what an upgrade breaks and mends, over all samples of all ranks."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torchmetrics import Metric

from lqf_lightning.congruence.flip_report import FlipReport, flip_report
from lqf_lightning.teachers.shared_classes import SharedClasses


class FlipTally(NamedTuple):
    """Counts of samples, whole numbers; classes in the order of the new model.

    Attributes:
        table: Samples by their class, old model right?, new model right? (C, 2, 2); rows of classes that the old model
            does not know are 0.
        negative_flips: Negative flips by their class, which the old model predicted, and the class that the new model
            predicts instead (C, C); None if they were not asked for.
        unshared: Samples left out because the old model does not know their class.
    """

    table: Tensor
    negative_flips: Tensor | None
    unshared: Tensor

    def report(self) -> FlipReport:
        """Rates over all samples whose class both models know.

        Returns:
            The rates.
        """
        return flip_report(self.table.sum(0))

    def class_reports(self) -> list[FlipReport]:
        """Rates over the samples of each class.

        Returns:
            The rates of every class of the new model; NaN for classes without samples.
        """
        return [flip_report(table) for table in self.table.cpu()]


class FlipCounts(Metric):
    """Right and wrong predictions of an old and a new model on the same samples, exact on uneven ranks.

    Models may know different classes, in different orders: classes are matched by name. Samples whose class the old
    model does not know can neither flip nor stay; they are left out and counted, as when an upgrade from 500 to 1000
    classes is evaluated on the 500 (Yan et al., CVPR 2021, section 4). Both models predict among all the classes that
    they know.

    All states are whole numbers that are summed over ranks; a rank without samples takes part.

    Args:
        new: Class names of the new model, in the order of its outputs.
        old: Class names of the old model, in the order of its outputs.
        matrix: Whether to count which class replaces which, in C * C numbers.

    Raises:
        ValueError: A model has several classes of the same name, or they share none.

    Example:
        >>> counts = FlipCounts(new=["cat", "dog", "fox"], old=["dog", "cat"])
        >>> new_prediction, old_prediction = torch.tensor([0, 2, 2, 1]), torch.tensor([1, 0, 0, 1])
        >>> counts.update(new_prediction, old_prediction, target=torch.tensor([0, 1, 2, 1]))
        >>> tally = counts.compute()
        >>> report = tally.report()
        >>> int(tally.unshared), report.number, round(report.nfr, 4), round(report.pfr, 4)
        (1, 3, 0.3333, 0.3333)
        >>> tally.negative_flips.tolist()  # a dog that was right is now a fox
        [[0, 0, 0], [0, 0, 1], [0, 0, 0]]
    """

    is_differentiable = False
    higher_is_better = None
    full_state_update = False

    table: Tensor
    negative_flips: Tensor
    unshared: Tensor

    def __init__(self, new: Sequence[str], old: Sequence[str], *, matrix: bool = True) -> None:
        super().__init__()
        for side, names in (("new", new), ("old", old)):
            if len(set(names)) < len(names):
                twice = sorted({name for name in names if list(names).count(name) > 1})
                raise ValueError(f"the {side} model has several classes of the same name: {twice[:5]}")
        self.shared, self.matrix = SharedClasses(new, old), matrix
        self.sizes = {"new_prediction": len(new), "old_prediction": len(old), "target": len(new)}
        width = len(new) if matrix else 0
        self.add_state("table", torch.zeros(len(new), 2, 2, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("negative_flips", torch.zeros(width, width, dtype=torch.int64), dist_reduce_fx="sum")
        self.add_state("unshared", torch.zeros((), dtype=torch.int64), dist_reduce_fx="sum")

    def update(self, new_prediction: Tensor, old_prediction: Tensor, target: Tensor) -> None:
        """Count a batch.

        Args:
            new_prediction: Predictions of the new model (B,), positions among its classes.
            old_prediction: Predictions of the old model (B,), positions among its own classes.
            target: True classes (B,), positions among the new model's classes.

        Raises:
            ValueError: Shapes differ from (B,), or positions are no classes.
            TypeError: Positions are no whole numbers.
        """  # noqa: DOC502 - both are raised by _check
        self._check({"new_prediction": new_prediction, "old_prediction": old_prediction, "target": target})
        new_prediction, old_prediction, target = (
            values.to(self.table.device, torch.int64) for values in (new_prediction, old_prediction, target)
        )
        expected = self.shared.old_position(target)
        known = expected >= 0
        old_right, new_right = (old_prediction == expected)[known], (new_prediction == target)[known]
        target, new_prediction = target[known], new_prediction[known]
        cells = 4 * target + 2 * old_right.long() + new_right.long()
        self.table += torch.bincount(cells, minlength=self.table.numel()).view_as(self.table)
        self.unshared += len(known) - len(target)
        if self.matrix:
            flipped = old_right & ~new_right
            cells = target[flipped] * len(self.negative_flips) + new_prediction[flipped]
            counts = torch.bincount(cells, minlength=self.negative_flips.numel())
            self.negative_flips += counts.view_as(self.negative_flips)

    def compute(self) -> FlipTally:
        """Counts over all samples of all ranks.

        Returns:
            The counts.
        """
        return FlipTally(self.table, self.negative_flips if self.matrix else None, self.unshared)

    def _check(self, positions: dict[str, Tensor]) -> None:
        shapes = {name: tuple(values.shape) for name, values in positions.items()}
        if len(set(shapes.values())) > 1 or len(shapes["target"]) != 1:
            raise ValueError(f"got shapes {shapes}, expected the same (B,) three times; of logits take argmax(-1)")
        for name, values in positions.items():
            if values.is_floating_point() or values.is_complex() or values.dtype == torch.bool:
                raise TypeError(f"`{name}` holds {values.dtype}, expected class positions as whole numbers")
            outside = (values < 0) | (values >= self.sizes[name])
            if bool(outside.any()):
                raise ValueError(
                    f"`{name}` holds {int(values[outside][0])}, expected class positions from 0 to "
                    f"{self.sizes[name] - 1}"
                )
