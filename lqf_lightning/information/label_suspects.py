"""Which labels the other samples contradict, and what they would say instead."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LabelSuspects:
    r"""What the model that has not seen a sample makes of its label, for every sample.

    Attributes:
        suspicion: The leave-one-out margin :math:`\max_{c \ne y} f_{-i,c}(x_i) - f_{-i,y}(x_i)` (n,), by which to rank:
            positive where the other samples give another class.
        proposed: The class that they give (n,), the largest prediction: the label's own where suspicion is negative.
        proposed_margin: Its distance from the second largest prediction (n,), how sure they are of it.
        squared_residual: :math:`\lVert e_i \rVert^2` (n,), how far the targets of the label are from the predictions.
    """

    suspicion: Tensor
    proposed: Tensor
    proposed_margin: Tensor
    squared_residual: Tensor


def label_suspects(prediction: Tensor, label: Tensor, residual: Tensor) -> LabelSuspects:
    r"""Rank labels by how much the other samples contradict them.

    With targets alpha times one-hot, another label c in place of y lowers the squared leave-one-out residual by
    :math:`2 \alpha (f_{-i,c} - f_{-i,y})`. So the margin is what the best other label would explain, while the squared
    residual holds against a label also what no label explains: outputs shrunk by the ridge, or far from everything.
    Its zero has a meaning, that of the residual does not. Both see the sample's own label only as a label: the
    predictions do not depend on it.

    Args:
        prediction: Leave-one-out predictions (n, C), `LeaveOneOut.prediction`.
        label: Class positions of the given labels (n,), integers.
        residual: Leave-one-out residuals (n, C), `LeaveOneOut.residual`.

    Returns:
        Margins and proposals, in units of the outputs; of equal predictions the first class is proposed.

    Raises:
        ValueError: Shapes do not fit, there are fewer than two classes, a label is none of their positions, or a
            prediction is not finite.

    Example:
        >>> import torch
        >>> prediction = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
        >>> label = torch.tensor([0, 2])
        >>> suspects = label_suspects(prediction, label, torch.eye(3)[label] - prediction)
        >>> [round(float(value), 6) for value in suspects.suspicion]
        [-0.5, 0.3]
        >>> suspects.proposed.tolist()
        [0, 1]
    """
    shape = tuple(prediction.shape)
    if len(shape) != 2 or residual.shape != shape or label.shape != shape[:1]:
        raise ValueError(
            f"expected predictions and residuals (n, C) and labels (n,), got {shape}, {tuple(residual.shape)} and "
            f"{tuple(label.shape)}"
        )
    if shape[1] < 2:
        raise ValueError("labels of a single output have no other class to propose: give it one output per class")
    if label.is_floating_point() or bool(((label < 0) | (label >= shape[1])).any()):
        raise ValueError(f"labels must be integers from 0 to {shape[1] - 1}, positions of classes")
    if not bool(torch.isfinite(prediction).all()):
        raise ValueError("`prediction` holds values that are not finite; check the images and the network")
    own = prediction.gather(1, label[:, None]).squeeze(1)
    others = prediction.scatter(1, label[:, None], -torch.inf)
    top = prediction.topk(2, dim=1).values
    return LabelSuspects(
        suspicion=others.amax(1) - own,
        proposed=prediction.argmax(1),
        proposed_margin=top[:, 0] - top[:, 1],
        squared_residual=residual.square().sum(1),
    )
