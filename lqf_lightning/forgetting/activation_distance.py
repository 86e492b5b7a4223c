"""How differently two models answer the same samples: the distance of their softmax outputs."""

from typing import Literal

import torch
from torch import Tensor

Norm = Literal["l1", "l2"]
_ORDERS = {"l1": 1, "l2": 2}


def activation_distance(logits: Tensor, reference: Tensor, *, norm: Norm = "l1", temperature: float = 1.0) -> float:
    r"""Mean distance between the softmax outputs of a model and those of the retrained one.

    .. math:: \frac1n \sum_i \lVert \mathrm{softmax}(f(x_i)/T) - \mathrm{softmax}(f_{ref}(x_i)/T) \rVert_p

    With the L1 norm (Golatkar et al., Mixed-Privacy Forgetting, CVPR 2021, section 8.1) it lies in [0, 2] and is twice
    the total variation between two sampled answers; other papers take the L2 norm under the same name, at most
    the root of 2, so that a number without its norm cannot be compared.

    A model that was fitted to scaled one-hot targets (`lqf`: 15 for the right class, 0 for the others) has outputs on
    the scale of its targets. They are no log-probabilities: softmax at T = 1 takes a fitted sample to within
    exp(-15) of one-hot, and what the distance then sees is samples whose decision is in doubt or has changed. It stays
    a fair comparison of two models with the same targets. A larger T makes it see smaller changes, and at T far above
    the outputs it becomes the plain distance of the centered outputs, divided by C T.

    Args:
        logits: Outputs of the model (n, C).
        reference: Outputs of the retrained model on the same samples, in the same order (n, C).
        norm: "l1" or "l2".
        temperature: T, in units of the outputs.

    Returns:
        The distance, 0 for equal models.

    Raises:
        ValueError: The shapes differ, there is no sample, or an option is out of range.

    Example:
        >>> import torch
        >>> one, other = torch.tensor([[50.0, 0.0], [0.0, 0.0]]), torch.tensor([[0.0, 50.0], [0.0, 0.0]])
        >>> activation_distance(one, other)  # all of the mass of one sample of two has moved
        1.0
    """
    if norm not in _ORDERS:
        raise ValueError(f"`norm` must be 'l1' or 'l2', got {norm!r}. Set norm=l1")
    if temperature <= 0:
        raise ValueError(f"`temperature` must be positive, got {temperature}. Set temperature=1")
    if logits.ndim != 2 or logits.shape != reference.shape or not logits.numel():
        raise ValueError(
            f"expected outputs (n, C) of the same samples, at least one, got {tuple(logits.shape)} and "
            f"{tuple(reference.shape)}"
        )
    first, second = (torch.softmax(rows.double() / temperature, 1) for rows in (logits, reference))
    return float(torch.linalg.vector_norm(first - second, ord=_ORDERS[norm], dim=1).mean())
