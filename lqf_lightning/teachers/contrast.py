"""Contrastive losses: telling the other view of an image from a queue of other images."""

from typing import Literal, get_args

import torch
from torch import Tensor

SameClass = Literal["positive", "ignored"]


def info_nce(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    r"""Cross-entropy of finding the own key among those of the queue (He et al., Momentum Contrast, CVPR 2020, eq. 1).

    .. math:: \frac1B \sum_i -\log \frac{\exp(q_i \cdot k_i / T)}
        {\exp(q_i \cdot k_i / T) + \sum_j \exp(q_i \cdot n_j / T)}

    Vectors are taken as they are: normalize them before. The queue may move on before the backward pass.

    Args:
        query: q (B, D).
        key: The other view of each k (B, D).
        queue: Keys of other images n (K, D).
        temperature: T.

    Returns:
        A scalar, in single precision at least; 0, with a graph, for a batch without samples.

    Example:
        >>> query = key = torch.tensor([[1.0, 0.0]])
        >>> round(info_nce(query, key, torch.tensor([[0.0, 1.0]]), temperature=1.0).item(), 4)  # log(1 + 1/e)
        0.3133
    """
    logits = _similarities(query, key, queue, temperature)
    return _mean(torch.logsumexp(logits, 1) - logits[:, 0])


def supervised_info_nce(
    query: Tensor,
    key: Tensor,
    label: Tensor,
    queue: Tensor,
    queue_label: Tensor,
    temperature: float,
    same_class: SameClass = "positive",
) -> Tensor:
    r"""`info_nce` that knows some classes, as in supervised momentum contrast (Majumder et al., arXiv 2101.11058).

    With "positive", the positives P_i are the own key and the keys of the queue of the same class, and the loss is
    supervised contrast (Khosla et al., Supervised Contrastive Learning, NeurIPS 2020, eq. 2) with the queue as batch:

    .. math:: \frac1B \sum_i -\frac{1}{|P_i|} \sum_{p \in P_i} \log \frac{\exp(q_i \cdot k_p / T)}
        {\exp(q_i \cdot k_i / T) + \sum_j \exp(q_i \cdot n_j / T)}

    With "ignored", the own key is the only positive, and keys of the queue of the same class leave the denominator.
    A class that is not known is equal to no other one: without any, both are `info_nce`.

    Args:
        query: q (B, D).
        key: The other view of each k (B, D).
        label: Classes of both (B,), -1 where unknown.
        queue: Keys of other images n (K, D).
        queue_label: Their classes (K,), -1 where unknown.
        temperature: T.
        same_class: What keys of the same class are.

    Returns:
        A scalar, in single precision at least; 0, with a graph, for a batch without samples.

    Raises:
        ValueError: There is no such `same_class`, or there is not one class per vector.

    Example:
        >>> query = key = torch.tensor([[1.0, 0.0]])
        >>> queue, labels = torch.tensor([[0.0, 1.0]]), torch.tensor([3])
        >>> both = [supervised_info_nce(query, key, labels, queue, labels, 1.0, s) for s in ("positive", "ignored")]
        >>> [round(value.item(), 4) for value in both]  # (log(1 + 1/e) + log(1 + e)) / 2, and nothing to tell from
        [0.8133, 0.0]
    """
    if same_class not in get_args(SameClass):
        raise ValueError(
            f"`same_class` must be one of {', '.join(get_args(SameClass))}, got {same_class!r}. "
            "Set method.same_class=positive"
        )
    logits = _similarities(query, key, queue, temperature)
    if label.shape != (len(query),) or queue_label.shape != (len(queue),):
        raise ValueError(
            f"expected one class per query ({len(query)},) and per key of the queue ({len(queue)},), got "
            f"{tuple(label.shape)} and {tuple(queue_label.shape)}"
        )
    same = (label[:, None] == queue_label[None]) & (label[:, None] >= 0)
    own = same.new_ones(len(label), 1)
    if same_class == "ignored":
        logits = logits.masked_fill(torch.cat([~own, same], 1), -torch.inf)
        positive = logits[:, 0]
    else:
        chosen = torch.cat([own, same], 1)
        positive = torch.where(chosen, logits, 0).sum(1) / chosen.sum(1)
    return _mean(torch.logsumexp(logits, 1) - positive)


def _similarities(query: Tensor, key: Tensor, queue: Tensor, temperature: float) -> Tensor:
    # (B, 1 + K), the own key first; of half precision, differences between exponents of 1 / T would be left over.
    if query.ndim != 2 or query.shape != key.shape or queue.shape[1:] != query.shape[1:]:
        raise ValueError(
            f"expected queries and keys (B, D) and a queue (K, D), got {tuple(query.shape)}, {tuple(key.shape)} and "
            f"{tuple(queue.shape)}"
        )
    if not temperature > 0:
        raise ValueError(f"the temperature must be positive, got {temperature}. Set method.temperature=0.2")
    dtype = torch.promote_types(torch.promote_types(query.dtype, key.dtype), torch.float32)
    with torch.autocast(query.device.type, enabled=False):
        query, key = query.to(dtype), key.to(dtype)
        # The product remembers the queue for its gradient: a copy, for the queue is overwritten in place.
        others = query @ queue.to(dtype, copy=True).T
        return torch.cat([(query * key).sum(1, keepdim=True), others], 1) / temperature


def _mean(values: Tensor) -> Tensor:
    return values.sum() / max(len(values), 1)
