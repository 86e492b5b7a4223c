"""Labels that a network gives to samples it is sure of."""

import torch
from torch import Tensor
from torch.nn import functional as F

_NOT_SELECTED = -100  # what torch's cross-entropy leaves out


@torch.no_grad()
def pseudo_labels(logits: Tensor, threshold: float) -> tuple[Tensor, Tensor]:
    r"""The most probable classes, and which of them are sure enough to learn from (Sohn et al., FixMatch, 2020).

    .. math:: \hat y_i = \arg\max_c p_{ic}, \qquad s_i = 1[\max_c p_{ic} \ge \tau]

    Args:
        logits: Outputs (B, C).
        threshold: tau; 0 selects all, anything above 1 none.

    Returns:
        Classes (B,), int64, and which are selected (B,), bool; both without gradient.

    Raises:
        ValueError: There are no classes, or the threshold is negative.

    Example:
        >>> label, selected = pseudo_labels(torch.tensor([[0.0, 0.0], [0.0, 3.0]]), threshold=0.7)
        >>> label.tolist(), selected.tolist()
        ([0, 1], [False, True])
    """
    if logits.ndim != 2 or not logits.shape[1]:
        raise ValueError(f"expected outputs (B, C) of at least one class, got {tuple(logits.shape)}")
    if not threshold >= 0:
        raise ValueError(f"the threshold must be a number of at least 0, got {threshold}. Set method.threshold=0.7")
    confidence, label = _in_single_precision(logits).softmax(1).max(1)
    return label, confidence >= threshold


def pseudo_label_loss(logits: Tensor, label: Tensor, selected: Tensor) -> Tensor:
    r"""Cross-entropy of the selected samples, divided by the number of all (Sohn et al., FixMatch, 2020, eq. 4).

    .. math:: \frac1B \sum_i s_i\, \mathrm{CE}(z_i, \hat y_i)

    As long as few samples are selected they thus weigh little. Divided by the number of the selected ones, one single
    sample would weigh as much as a batch.

    Args:
        logits: Outputs z (B, C).
        label: Classes (B,).
        selected: Which count s (B,), bool.

    Returns:
        A scalar, in single precision at least; 0, with a graph, where no sample is selected.

    Raises:
        ValueError: There is not one label and one selection per sample, or selections are not of type bool.

    Example:
        >>> logits, label = torch.zeros(2, 4), torch.tensor([1, 3])
        >>> round(pseudo_label_loss(logits, label, torch.tensor([True, False])).item(), 4)  # log(4) / 2
        0.6931
    """
    if logits.ndim != 2 or label.shape != logits.shape[:1] or selected.shape != logits.shape[:1]:
        raise ValueError(
            f"expected outputs (B, C) with one label and one selection per row, got {tuple(logits.shape)}, "
            f"{tuple(label.shape)} and {tuple(selected.shape)}"
        )
    if selected.dtype != torch.bool:
        raise ValueError(f"selections must be of type bool, got {selected.dtype}")
    kept = torch.where(selected, label, _NOT_SELECTED)
    total = F.cross_entropy(_in_single_precision(logits), kept, ignore_index=_NOT_SELECTED, reduction="sum")
    return total / max(len(logits), 1)


def _in_single_precision(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))
