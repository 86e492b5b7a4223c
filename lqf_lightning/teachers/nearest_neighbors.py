"""Classification by the nearest neighbors, which needs no training."""

import torch
from torch import Tensor
from torch.nn import functional as F

_ENTRIES = 2**24  # similarities that are held at once


@torch.no_grad()
def neighbor_votes(
    queries: Tensor, memory: Tensor, label: Tensor, classes: int, k: int = 20, temperature: float | None = None
) -> Tensor:
    r"""Votes of the k rows of a memory that point most nearly in the direction of each query.

    Neighbors are those with the largest cosine s. Each has one vote for its class, or, with a temperature, a weight
    that falls with its distance (Wu et al., Unsupervised Feature Learning via Non-Parametric Instance Discrimination,
    CVPR 2018, section 3.4), here relative to the nearest one's, which cannot overflow and changes no prediction:

    .. math:: v_c = \sum_{j \in N_k} 1[y_j = c]\, \exp((s_j - \max_l s_l) / T)

    The prediction is ``votes.argmax(1)``: of classes with equally many votes the one with the lower position. Which of
    equally similar rows is the k-th is left open.

    Args:
        queries: Features (Q, D).
        memory: Features of known samples (M, D).
        label: Their classes (M,).
        classes: Number of classes C.
        k: Number of neighbors.
        temperature: T; None: one vote each.

    Returns:
        Votes (Q, C), in single precision at least. Memory is needed for a bounded number of similarities at a time.

    Raises:
        ValueError: The shapes do not fit, a class is unknown, there are fewer than k rows, or the temperature is not
            positive.

    Example:
        >>> memory, label = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0]]), torch.tensor([2, 2, 0])
        >>> neighbor_votes(torch.tensor([[5.0, 0.0], [0.0, 1.0]]), memory, label, classes=3, k=2).tolist()
        [[0.0, 0.0, 2.0], [1.0, 0.0, 1.0]]
    """
    _refuse_shapes(queries, memory, label, classes)
    if not 1 <= k <= len(memory):
        raise ValueError(
            f"cannot ask {k} neighbors in a memory of {len(memory)} samples, expected 1 to {len(memory)}. Set "
            f"callbacks.knn.k={max(1, min(20, len(memory)))}"
        )
    if temperature is not None and not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}. Set callbacks.knn.temperature=0.07")
    dtype = torch.promote_types(torch.promote_types(queries.dtype, memory.dtype), torch.float32)
    with torch.autocast(queries.device.type, enabled=False):
        directions = F.normalize(memory.to(dtype), dim=1).T
        votes = queries.new_zeros(len(queries), classes, dtype=dtype)
        rows = max(1, _ENTRIES // len(memory))
        for start in range(0, len(queries), rows):
            part = F.normalize(queries[start : start + rows].to(dtype), dim=1)
            similarity, neighbors = (part @ directions).topk(k, dim=1)
            weight = torch.ones_like(similarity)
            if temperature is not None:
                weight = ((similarity - similarity[:, :1]) / temperature).exp()
            votes[start : start + rows].scatter_add_(1, label[neighbors], weight)
    return votes


def _refuse_shapes(queries: Tensor, memory: Tensor, label: Tensor, classes: int) -> None:
    if queries.ndim != 2 or memory.shape[1:] != queries.shape[1:] or label.shape != memory.shape[:1]:
        raise ValueError(
            f"expected queries (Q, D), a memory (M, D) and its classes (M,), got {tuple(queries.shape)}, "
            f"{tuple(memory.shape)} and {tuple(label.shape)}"
        )
    low, high = (int(label.min()), int(label.max())) if len(label) else (0, 0)
    if low < 0 or high >= classes:
        raise ValueError(
            f"classes must lie between 0 and {classes - 1}, got {low} to {high}: leave samples without a known class "
            "out of the memory"
        )
