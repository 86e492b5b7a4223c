"""What every method reports about its predictions."""

import math
from collections.abc import Sequence
from typing import Any

from torch import Tensor
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError, MulticlassRecall
from torchmetrics.wrappers import ClasswiseWrapper

NO_SAMPLE = -1  # label of a row that no metric counts: torchmetrics cannot be updated with zero rows


def classification_metrics(classes: Sequence[str], stage: str) -> MetricCollection:
    """Accuracy, accuracy of each class and expected calibration error, exact on uneven ranks.

    Keys are ``stage/acc``, ``stage/acc/<class>`` (NaN for a class without samples) and ``stage/ece`` (15 bins on the
    softmax of the outputs).

    Args:
        classes: Class names, in the order of the outputs.
        stage: "val" or "test".

    Returns:
        A collection to be updated with outputs (B, C) and class positions (B,).
    """
    number = len(classes)
    # Unchecked: the check refuses NaN, and labels were checked against the classes before training.
    options: dict[str, Any] = {"validate_args": False, "ignore_index": NO_SAMPLE}
    recall = MulticlassRecall(number, average=None, zero_division=math.nan, **options)
    return MetricCollection(
        {
            "acc": MulticlassAccuracy(number, average="micro", **options),
            "class_acc": ClasswiseWrapper(recall, labels=list(classes), prefix="acc/"),
            "ece": _CalibrationError(number, **options),
        },
        prefix=f"{stage}/",
    )


class _CalibrationError(MulticlassCalibrationError):
    # torchmetrics takes a batch whose outputs all happen to lie in [0, 1] for probabilities.
    def update(self, preds: Tensor, target: Tensor) -> None:
        super().update(preds.softmax(-1), target)
