"""Several trainings of the same network averaged in their weights."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lqf_lightning.congruence.state_layout import State, check_layout


def soup(states: Iterable[State]) -> dict[str, Tensor]:
    r"""Average models in their weights (Wortsman et al., ICML 2022, uniform soup).

    .. math:: \theta = \frac1L \sum_l \theta_l

    Sums are in double precision and rounded once. Whole numbers are those of the first model. A single model is
    returned bit for bit. Running statistics of batch normalization need `reestimate_batch_norm`, as for `interpolate`.

    Args:
        states: States of one architecture with the same classes; only one at a time is held.

    Returns:
        Their mean, in tensors of its own.

    Raises:
        ValueError: There is no state, or names, shapes or types differ.

    Example:
        >>> import torch
        >>> soup({"weight": torch.tensor([value, 0.0])} for value in (1.0, 2.0, 6.0))
        {'weight': tensor([3., 0.])}
    """
    first: dict[str, Tensor] = {}
    sums: dict[str, Tensor] = {}
    count = 0
    for count, state in enumerate(states, 1):
        if count == 1:
            first = {name: entry.detach().clone() for name, entry in state.items()}
            sums = {name: entry.to(torch.float64) for name, entry in first.items() if entry.is_floating_point()}
            continue
        check_layout(first, state, ("first", f"{count}th" if count > 3 else ("second", "third")[count - 2]))
        for name, total in sums.items():
            total += state[name].detach().to(total.device, torch.float64)
    if count == 0:
        raise ValueError("got no model to average, expected at least one state")
    if count == 1:
        return first
    return {name: (sums[name] / count).to(entry.dtype) if name in sums else entry for name, entry in first.items()}
