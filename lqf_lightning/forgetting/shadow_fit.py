"""What shadow models say about a sample: how confident models are that had it, and models that had not."""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["auto", "own", "pooled"]
ENOUGH = 32  # models on each side from which on a sample has a deviation of its own
_LEAST = 1e-9  # of the size of the confidences: deviations below it are rounding


@dataclass(frozen=True)
class ShadowFit:
    """Normal distributions of a sample's confidence, for every sample.

    Attributes:
        mean_in: Mean among models that were trained on it (n,).
        deviation_in: Standard deviation of these (n,).
        mean_out: Mean among the others (n,).
        deviation_out: Standard deviation of these (n,).
        count_out: How many others there are (n,).
    """

    mean_in: Tensor
    deviation_in: Tensor
    mean_out: Tensor
    deviation_out: Tensor
    count_out: Tensor

    def log_ratio(self, observed: Tensor) -> Tensor:
        r"""Log likelihood ratio of the two, :math:`\log N(o; in) - \log N(o; out)`.

        Args:
            observed: Confidences of the model in question (n,).

        Returns:
            Nats (n,); positive speaks for membership.
        """
        parts = ((self.mean_in, self.deviation_in), (self.mean_out, self.deviation_out))
        inside, outside = (-0.5 * ((observed - mean) / scale).square() - scale.log() for mean, scale in parts)
        return inside - outside

    def surprise(self, observed: Tensor) -> Tensor:
        """How far a confidence is above those of models without the sample.

        Args:
            observed: Confidences of the model in question (n,).

        Returns:
            Standard deviations of a new observation (n,), the error of the mean included.
        """
        return (observed - self.mean_out) / (self.deviation_out * (1 + 1 / self.count_out).sqrt())


def logit_confidence(logits: Tensor, label: Tensor) -> Tensor:
    r"""Log-odds of the right class, :math:`\log \frac{p_y}{1 - p_y} = f_y - \log \sum_{k \ne y} e^{f_k}`.

    Unlike the probability itself it is about normal over models, which likelihood ratios rely on (Carlini et al.,
    Membership Inference Attacks From First Principles, 2022, section IV-B), and it is computed without cancellation.

    Args:
        logits: Outputs (..., n, C), C at least 2.
        label: Class positions (n,).

    Returns:
        Nats (..., n).

    Raises:
        ValueError: There are fewer than two outputs, or labels that are no class.

    Example:
        >>> import torch
        >>> logit_confidence(torch.tensor([[900.0, 0.0, 0.0]]), torch.tensor([1])).tolist()
        [-900.0]
    """
    if logits.shape[-1] < 2 or label.shape != logits.shape[-2:-1]:
        raise ValueError(
            f"expected outputs (n, C >= 2) and labels (n,), got {tuple(logits.shape)}, {tuple(label.shape)}"
        )
    if bool(((label < 0) | (label >= logits.shape[-1])).any()):
        raise ValueError(f"labels must be classes 0 to {logits.shape[-1] - 1}, got {label.min()} to {label.max()}")
    spread = label.reshape(-1, 1).expand(*logits.shape[:-1], 1)
    own = logits.double().gather(-1, spread)
    others = logits.double().scatter(-1, spread, -torch.inf)
    return own.squeeze(-1) - others.logsumexp(-1)


def fit_shadows(confidence: Tensor, member: Tensor, spread: Spread = "auto") -> ShadowFit:
    """Fit two normal distributions to every sample.

    Args:
        confidence: Of every shadow model on every sample (T, n).
        member: Whether the model was trained on the sample (T, n), bool. A sample that no model was trained on has no
            distribution "in" (not a number).
        spread: "own" takes a deviation per sample, "pooled" one over all samples, less noisy for few models (Carlini et
            al., section VI-A); "auto": own from 32 models on each side.

    Returns:
        The distributions.

    Raises:
        ValueError: The shapes differ, a sample has fewer than two models without it, or exactly one with it.

    Example:
        >>> import torch
        >>> member = torch.tensor([[True], [True], [False], [False]])
        >>> fit = fit_shadows(torch.tensor([[3.0], [5.0], [0.0], [2.0]]), member)
        >>> fit.mean_in.tolist(), fit.mean_out.tolist(), round(fit.log_ratio(torch.tensor([3.0])).item(), 3)
        ([4.0], [1.0], 0.75)
    """
    if confidence.ndim != 2 or confidence.shape != member.shape:
        raise ValueError(f"expected (T, n) twice, got {tuple(confidence.shape)} and {tuple(member.shape)}")
    counts = member.sum(0), (~member).sum(0)
    if bool((counts[1] < 2).any() | (counts[0] == 1).any()):
        raise ValueError(
            f"every sample needs two shadow models with it and two without, got {int(counts[0].min())} and "
            f"{int(counts[1].min())} at least. Set shadows=64"
        )
    mean_in, deviation_in = _moments(confidence.double(), member, spread)
    mean_out, deviation_out = _moments(confidence.double(), ~member, spread)
    return ShadowFit(mean_in, deviation_in, mean_out, deviation_out, counts[1].double())


def _moments(confidence: Tensor, chosen: Tensor, spread: Spread) -> tuple[Tensor, Tensor]:
    counts = chosen.sum(0).double()
    mean = torch.where(chosen, confidence, 0.0).sum(0) / counts
    squares = torch.where(chosen, confidence - mean, 0.0).square().sum(0)
    freedom = counts - 1
    present = freedom > 0
    if spread == "pooled" or (spread == "auto" and bool((counts[present] < ENOUGH).any())):
        squares = (squares[present].sum() / freedom[present].sum()).expand_as(squares) * freedom
    floor = _LEAST * confidence.abs().max().clamp_min(1.0)
    return mean, torch.where(present, (squares / freedom).sqrt().clamp_min(floor), torch.nan)
