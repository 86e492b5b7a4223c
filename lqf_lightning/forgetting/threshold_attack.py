"""A membership attack on one number per sample: the threshold that tells members from others best."""

from dataclasses import dataclass

import torch
from torch import Tensor

_BOOTSTRAPS = 200


@dataclass(frozen=True)
class ThresholdAttack:
    """What the attack says about a cohort.

    Attributes:
        share: Share of the cohort that is called member.
        error: Standard error of the share: the binomial one of the cohort and the bootstrap one of the boundary.
        threshold: The boundary, in units of the score; None where all known scores are equal.
        below: Whether members are those below it.
        balanced_accuracy: Mean of the shares of members and of others that the boundary gets right, on the samples
            that chose it: 0.5 if it knows nothing, in which case the share of the cohort is arbitrary.
    """

    share: float
    error: float
    threshold: float | None
    below: bool
    balanced_accuracy: float


def threshold_attack(members: Tensor, others: Tensor, cohort: Tensor, *, seed: int = 0) -> ThresholdAttack:
    r"""Call those of a cohort members that lie on the members' side of the best threshold.

    Of all thresholds halfway between neighboring scores, in both directions, the one of the best balanced accuracy is
    taken, so that it does not matter how many more members than others are known. If all scores are equal there is no
    threshold, and the cohort is called member by a fair coin.

    The standard error adds two variances: that of a share p of n members of the cohort, with two successes and two
    failures added so that it is not 0 at p = 0 or 1 (Agresti and Coull), and that of the boundary, from 200 bootstrap
    samples of members and of others.

    Args:
        members: Scores of samples that were trained on (n,).
        others: Scores of samples that were not (m,).
        cohort: Scores of the samples in question (f,).
        seed: Of the bootstrap.

    Returns:
        Share of the cohort called member, and how sure that is. The order of the samples plays no part.

    Raises:
        ValueError: One of the three is empty, or holds numbers that are not finite.

    Example:
        >>> import torch
        >>> found = threshold_attack(torch.tensor([0.1, 0.2, 0.1]), torch.tensor([0.8, 0.6]), torch.tensor([0.0, 0.9]))
        >>> found.share, round(found.threshold, 3), found.below, found.balanced_accuracy
        (0.5, 0.4, True, 1.0)
    """
    groups = {"members": members, "others": others, "cohort": cohort}
    for name, scores in groups.items():
        if scores.ndim != 1 or not len(scores) or not bool(torch.isfinite(scores).all()):
            raise ValueError(
                f"`{name}` must be (n,) finite scores, at least one, got {tuple(scores.shape)}. A model whose outputs "
                "are not numbers has diverged; without test samples set data.val_fraction=0.1"
            )
    known, places = torch.unique(torch.cat([members, others]).double().cpu(), return_inverse=True)
    counts = [_count(part, len(known)) for part in (places[: len(members)], places[len(members) :])]
    cut, below, accuracy = _best_cut(*counts)
    wanted = cohort.double().cpu()
    share = _share(wanted, known, cut, below)
    total = len(wanted) + 4.0
    smoothed = (share * len(wanted) + 2.0) / total
    moved = torch.tensor([_share(wanted, known, *_best_cut(*drawn)[:2]) for drawn in _bootstrap(counts, seed)])
    error = (smoothed * (1 - smoothed) / total + float(moved.double().var(correction=0))) ** 0.5
    return ThresholdAttack(share, error, _boundary(known, cut), below, accuracy)


def _count(places: Tensor, size: int) -> Tensor:
    return torch.bincount(places, minlength=size).double()


def _bootstrap(counts: list[Tensor], seed: int) -> list[list[Tensor]]:
    # Drawn by sorted score, so that the order of the samples plays no part.
    draw = torch.Generator().manual_seed(seed)
    shares = [count.cumsum(0) for count in counts]
    drawn = []
    for _ in range(_BOOTSTRAPS):
        spots = [torch.rand(int(share[-1]), generator=draw, dtype=torch.float64) * share[-1] for share in shares]
        places = [
            torch.searchsorted(s, x, right=True).clamp(max=len(s) - 1) for s, x in zip(shares, spots, strict=True)
        ]
        drawn.append([_count(place, len(shares[0])) for place in places])
    return drawn


def _best_cut(members: Tensor, others: Tensor) -> tuple[int | None, bool, float]:
    # Position of the score below the boundary, direction, and balanced accuracy.
    if len(members) < 2:
        return None, True, 0.5
    gap = (members.cumsum(0) / members.sum() - others.cumsum(0) / others.sum())[:-1]
    cut = int(gap.abs().argmax())
    return cut, bool(gap[cut] >= 0), 0.5 + 0.5 * float(gap[cut].abs())


def _boundary(known: Tensor, cut: int | None) -> float | None:
    if cut is None:
        return None
    middle = float(0.5 * (known[cut] + known[cut + 1]))
    return middle if middle < float(known[cut + 1]) else float(known[cut])  # neighbors in double precision


def _share(cohort: Tensor, known: Tensor, cut: int | None, below: bool) -> float:
    boundary = _boundary(known, cut)
    if boundary is None:
        return 0.5
    called = cohort <= boundary if below else cohort > boundary
    return float(called.double().mean())
