"""Membership from how sure a model is: the entropy of its answers."""

import torch
from torch import Tensor

from lqf_lightning.forgetting.threshold_attack import ThresholdAttack, threshold_attack


def output_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    r"""Entropy of the softmax outputs, :math:`-\sum_k p_k \log p_k`, for logits of any size.

    Args:
        logits: Outputs (n, C).
        temperature: T of the softmax, see `activation_distance`.

    Returns:
        Nats (n,), between 0 (one-hot) and log C (uniform).

    Raises:
        ValueError: The outputs are not (n, C), or the temperature is not positive.

    Example:
        >>> import torch
        >>> [round(value, 4) for value in output_entropy(torch.tensor([[0.0, 0.0], [1e6, 0.0]])).tolist()]
        [0.6931, 0.0]
    """
    if logits.ndim != 2:
        raise ValueError(f"expected outputs (n, C), got {tuple(logits.shape)}")
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}. Set temperature=1")
    log_share = torch.log_softmax(logits.double() / temperature, 1)
    return (log_share.exp() * log_share).sum(1).abs()


def entropy_attack(
    retained: Tensor, test: Tensor, cohort: Tensor, *, temperature: float = 1.0, seed: int = 0
) -> ThresholdAttack:
    """Which share of a cohort a model treats like samples that it was trained on.

    The attack of Golatkar et al. (ECCV 2020; CVPR 2021, section 8.1): learn from retained training samples and from
    test samples what the entropy of members looks like, then ask about the cohort. **The aim is the score that the
    retrained model gets**, neither 0 nor one half: samples that are easy look like members to any model.

    The papers' classifier is a support vector machine with Gaussian kernel (C = 3), which may call several intervals of
    entropy members, minimizes a hinge loss, and on many more members than test samples leans to calling everything a
    member. Here it is the one threshold of the best balanced accuracy (`threshold_attack`): no option to
    tune, the same weight for both classes whatever their sizes, and a boundary that can be told.

    Args:
        retained: Outputs on training samples outside of the cohort (n, C).
        test: Outputs on samples that were never trained on (m, C).
        cohort: Outputs on the cohort (f, C).
        temperature: T of the softmax, see `activation_distance`.
        seed: Of the bootstrap for the standard error.

    Returns:
        The share called member, with its standard error. Refusals are those of `threshold_attack`.

    Example:
        >>> import torch
        >>> sure, unsure = torch.tensor([[9.0, 0.0]]), torch.tensor([[0.2, 0.0]])
        >>> entropy_attack(sure.repeat(5, 1), unsure.repeat(3, 1), torch.cat([sure, sure, sure, unsure])).share
        0.75
    """
    entropies = [output_entropy(logits, temperature) for logits in (retained, test, cohort)]
    return threshold_attack(*entropies, seed=seed)
