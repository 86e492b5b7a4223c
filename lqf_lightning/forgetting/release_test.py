"""Whether the releases of two models can be told apart at all: a permutation test that needs no assumption."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class ReleaseTest:
    """Outcome of a permutation test.

    Attributes:
        statistic: Energy distance of the two groups of releases, in units of the outputs; 0 in the mean if equal.
        p_value: Share of the permutations (the given grouping among them) whose distance is at least as large.
        permutations: How many were drawn.
    """

    statistic: float
    p_value: float
    permutations: int


def release_test(first: Tensor, second: Tensor, *, permutations: int = 999, seed: int = 0) -> ReleaseTest:
    r"""Test whether two groups of noisy releases come from the same distribution.

    One row is one release: the answers of one noisy model to all queries. The rows, not the samples, are exchangeable
    under the hypothesis, because the noise on the weights moves all answers of a release together; a test that permuted
    samples would find differences where there are none. The statistic is the energy distance (Szekely and Rizzo),

    .. math:: 2\,E\lVert X - Y \rVert - E\lVert X - X' \rVert - E\lVert Y - Y' \rVert,

    which is positive for any two different distributions. The p-value is exact for any sample size: under the
    hypothesis it is at most p with probability p. It cannot be below 1 / (permutations + 1).

    Args:
        first: Releases of one model (r, q).
        second: Releases of the other (s, q).
        permutations: How many groupings are drawn.
        seed: Of the drawing.

    Returns:
        Distance and p-value.

    Raises:
        ValueError: There are fewer than two releases of a model, or they answer different queries.

    Example:
        >>> import torch
        >>> noise = torch.randn(2, 20, 3, generator=torch.Generator().manual_seed(0))
        >>> release_test(noise[0], noise[1]).p_value > 0.05, release_test(noise[0], noise[1] + 3).p_value
        (True, 0.001)
    """
    if first.ndim != 2 or second.ndim != 2 or first.shape[1] != second.shape[1] or min(len(first), len(second)) < 2:
        raise ValueError(
            f"expected releases (r, q) and (s, q), at least two of each, got {tuple(first.shape)} and "
            f"{tuple(second.shape)}"
        )
    if permutations < 1:
        raise ValueError(f"at least one permutation is needed, got {permutations}. Set permutations=999")
    rows = torch.cat([first, second]).double().cpu()
    distances, draw = torch.cdist(rows, rows, compute_mode="donot_use_mm_for_euclid_dist"), torch.Generator()
    draw.manual_seed(seed)
    own = torch.cat([torch.ones(len(first)), torch.zeros(len(second))]).double()
    orders = [torch.arange(len(rows)), *(torch.randperm(len(rows), generator=draw) for _ in range(permutations))]
    values = _energy(distances, own[torch.stack(orders)])
    found = float(values[0])
    reached = int((values[1:] >= found - 1e-12 * abs(found)).sum())
    return ReleaseTest(found, (1 + reached) / (1 + permutations), permutations)


def _energy(distances: Tensor, first: Tensor) -> Tensor:
    # One grouping per row of `first`; means over different pairs only.
    second = 1 - first
    sizes = float(first[0].sum()), float(second[0].sum())
    to_first, to_second = first @ distances, second @ distances
    between = 2 * (to_first * second).sum(1) / (sizes[0] * sizes[1])
    pairs = tuple(size * (size - 1) for size in sizes)
    return between - (to_first * first).sum(1) / pairs[0] - (to_second * second).sum(1) / pairs[1]
