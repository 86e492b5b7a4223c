"""Which labels the other samples contradict, and what they would say instead."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import one_hot

from lqf_lightning.linear.held_out import held_out_cross_entropy


@dataclass(frozen=True)
class LabelSuspects:
    r"""What the model that has not seen a sample makes of its label, for every sample.

    Attributes:
        suspicion: How much the label surprises the other samples, in nats (n,), by which to rank:
            :math:`-\log \mathrm{softmax}(f_{-i}(x_i) / T)_y`.
        margin: :math:`\max_{c \ne y} f_{-i,c}(x_i) - f_{-i,y}(x_i)` (n,), in units of the outputs: positive where the
            other samples give another class.
        proposed: The class that they give (n,), the largest prediction: the label's own where the margin is negative.
        proposed_margin: Its distance from the second largest prediction (n,), how sure they are of it.
        squared_residual: :math:`\lVert e_i \rVert^2` (n,), how far the targets of the label are from the predictions.
    """

    suspicion: Tensor
    margin: Tensor
    proposed: Tensor
    proposed_margin: Tensor
    squared_residual: Tensor


def label_suspects(prediction: Tensor, label: Tensor, residual: Tensor) -> LabelSuspects:
    r"""Rank labels by how much the other samples contradict them.

    Predictions of a squared loss are no logits; divided by the temperature T that suits all labels best
    (`held_out_cross_entropy`) they give probabilities, and the suspicion is what a label costs by them. It uses all
    outputs, as the squared residual does, and ignores what is common to them, as the margin does: with targets alpha
    times one-hot, the best other label lowers the squared residual by 2 alpha times the margin. All three see the
    sample's own label only as a label: the predictions do not depend on it. Where no temperature beats guessing, all
    labels are as suspicious, by log C.

    Args:
        prediction: Leave-one-out predictions (n, C), `LeaveOneOut.prediction`.
        label: Class positions of the given labels (n,), integers.
        residual: Leave-one-out residuals (n, C), `LeaveOneOut.residual`.

    Returns:
        Suspicions and proposals; of equal predictions the first class is proposed.

    Raises:
        ValueError: Shapes do not fit, there are fewer than two classes, a label is none of their positions, or a
            prediction is not finite.

    Example:
        >>> import torch
        >>> prediction = torch.tensor([[0.7, 0.2, 0.1], [0.1, 0.6, 0.3]])
        >>> label = torch.tensor([0, 2])
        >>> suspects = label_suspects(prediction, label, torch.eye(3)[label] - prediction)
        >>> [round(float(value), 6) for value in suspects.margin]
        [-0.5, 0.3]
        >>> bool(suspects.suspicion[1] > suspects.suspicion[0])
        True
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
    _, temperature = held_out_cross_entropy(prediction, one_hot(label, shape[1]))
    return LabelSuspects(
        suspicion=-torch.log_softmax(prediction / temperature, 1).gather(1, label[:, None]).squeeze(1),
        margin=others.amax(1) - own,
        proposed=prediction.argmax(1),
        proposed_margin=top[:, 0] - top[:, 1],
        squared_residual=residual.square().sum(1),
    )
