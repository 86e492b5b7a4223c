"""How a loss on labels and a distance to an old model become one objective."""

from typing import Literal

from torch import Tensor

Mixing = Literal["paper", "released"]


def mixed_objective(
    cross_entropy: Tensor,
    distillation: Tensor,
    mixing: Mixing = "paper",
    strength: float = 1.0,
    distillation_share: float = 0.9,
) -> Tensor:
    r"""Add a distance to a loss (Yan et al., Positive-Congruent Training, CVPR 2021, eq. 4).

    .. math:: CE + \lambda\, FD \;(\text{paper}), \qquad (1 - s)\, CE + s\, FD \;(\text{released})

    "released" is what the recipes of the authors' code do; the second weight scales the whole objective too, so a
    learning rate means another thing.

    Args:
        cross_entropy: Mean loss on labels, a scalar.
        distillation: Weighted mean distance, a scalar.
        mixing: "paper" or "released", as above.
        strength: The factor lambda of "paper".
        distillation_share: The share s of "released".

    Returns:
        A scalar.

    Raises:
        ValueError: The mixing is neither, or a term is not a scalar.

    Example:
        >>> import torch
        >>> ce, fd = torch.tensor(2.0), torch.tensor(1.0)
        >>> mixed_objective(ce, fd, "paper", strength=0.5).item()
        2.5
        >>> round(mixed_objective(ce, fd, "released", distillation_share=0.9).item(), 4)
        1.1
    """
    if cross_entropy.ndim or distillation.ndim:
        shapes = (tuple(cross_entropy.shape), tuple(distillation.shape))
        raise ValueError(f"both terms must be means over the batch, scalars, got shapes {shapes[0]} and {shapes[1]}")
    if mixing == "paper":
        return cross_entropy + strength * distillation
    if mixing == "released":
        return (1 - distillation_share) * cross_entropy + distillation_share * distillation
    raise ValueError(f"`mixing` must be 'paper' or 'released', got {mixing!r}. Set method.mixing=paper")
