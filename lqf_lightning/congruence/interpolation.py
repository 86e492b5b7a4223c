"""An old and a new model averaged in their weights, after training.

All functions work on plain states (`model.state_dict()`) of one architecture. The running statistics of batch
normalization are interpolated with the rest, but those of interpolated weights are others: let
`reestimate_batch_norm` find them before the model is used.
"""

import torch
from torch import Tensor

from lqf_lightning.congruence.state_layout import State, check_layout


def interpolate(old: State, new: State, share: float) -> dict[str, Tensor]:
    r"""Interpolate between an old and a new model (Schumann et al., 2023, backward compatible weight interpolation).

    .. math:: \theta = a\, \theta_\mathrm{old} + (1 - a)\, \theta_\mathrm{new}

    Computed in double precision and rounded once. Whole numbers, which no average fits, are the new model's. At the
    ends every entry is that model's, bit for bit.

    Args:
        old: State of the old model; for other classes see `align_classes`.
        new: State of the new model.
        share: Share a of the old model, from 0 (the new model) to 1 (the old one).

    Returns:
        The state between them, in tensors of its own.

    Raises:
        ValueError: The states differ in names, shapes or types, or the share is outside [0, 1].

    Example:
        >>> import torch
        >>> old, new = {"weight": torch.tensor([1.0, 2.0])}, {"weight": torch.tensor([5.0, 0.0])}
        >>> interpolate(old, new, 0.75)["weight"].tolist()
        [2.0, 1.5]
    """  # noqa: DOC502 - raised by the checks
    _check_share(share)
    check_layout(old, new)
    if share in (0, 1):
        return _copy(old if share else new)
    return {name: _mix(old[name], entry, share) for name, entry in new.items()}


def fisher_interpolate(old: State, new: State, share: float, fisher: State) -> dict[str, Tensor]:
    r"""Interpolate the more towards the old model, the more its outputs depend on a weight (Schumann et al., 2023).

    .. math:: \theta = \frac{a F\, \theta_\mathrm{old} + (1 - a)\, \theta_\mathrm{new}}{a F + (1 - a)}

    The size of F matters, not only its direction: where F = 1 the share is a. Fishers of networks are far smaller, so
    normalize them to a mean of 1 (`diagonal_fisher(..., normalize=True)`). Weights with F = 0, on which the old model
    does not depend, are the new model's for any a < 1; at a = 1 every entry is the old model's, also there, where the
    formula has no value.

    Args:
        old: State of the old model; for other classes see `align_classes`, also for the Fisher.
        new: State of the new model.
        share: Share a of the old model, from 0 (the new model) to 1 (the old one).
        fisher: Diagonal Fisher F of the old model for some of the entries, non-negative, shaped like them. The others,
            such as running statistics, are interpolated as if F = 1.

    Returns:
        The state between them, in tensors of its own.

    Raises:
        ValueError: The states differ in names, shapes or types, the share is outside [0, 1], or the Fisher does not fit
            or is negative or not finite.

    Example:
        >>> import torch
        >>> old, new = {"weight": torch.tensor([1.0, 1.0, 1.0])}, {"weight": torch.tensor([0.0, 0.0, 0.0])}
        >>> fisher = {"weight": torch.tensor([0.0, 1.0, 3.0])}
        >>> fisher_interpolate(old, new, 0.5, fisher)["weight"].tolist()
        [0.0, 0.5, 0.75]
    """  # noqa: DOC502 - raised by the checks
    _check_share(share)
    check_layout(old, new)
    _check_fisher(fisher, old)
    if share in (0, 1):
        return _copy(old if share else new)
    blended = {}
    for name, entry in new.items():
        weight: float | Tensor = share
        if name in fisher:
            scaled = share * fisher[name].to(entry.device, torch.float64)
            weight = scaled / (scaled + (1 - share))
        blended[name] = _mix(old[name], entry, weight)
    return blended


def _mix(old: Tensor, new: Tensor, weight: float | Tensor) -> Tensor:
    if not new.is_floating_point():
        return new.detach().clone()
    start, end = new.detach().to(torch.float64), old.detach().to(new.device, torch.float64)
    return torch.lerp(start, end, weight).to(new.dtype)


def _copy(state: State) -> dict[str, Tensor]:
    return {name: entry.detach().clone() for name, entry in state.items()}


def _check_share(share: float) -> None:
    if not 0 <= share <= 1:
        raise ValueError(f"the share of the old model must be from 0 (the new model) to 1 (the old one), got {share}")


def _check_fisher(fisher: State, old: State) -> None:
    for name, entry in fisher.items():
        if name not in old or not old[name].is_floating_point() or entry.shape != old[name].shape:
            wanted = f"{tuple(old[name].shape)} {old[name].dtype}" if name in old else "no such entry"
            raise ValueError(
                f"the Fisher holds {name} of shape {tuple(entry.shape)}, and the old model {wanted}; expected the "
                "Fisher of this model, as from `diagonal_fisher`"
            )
        if not bool((entry >= 0).all() & entry.isfinite().all()):
            raise ValueError(f"the Fisher of {name} is negative or not finite, expected a mean of squares")
