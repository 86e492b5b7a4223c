"""A plain gradient step on samples that are shared out over processes, and a learning rate at which it is stable."""

from collections.abc import Sequence

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import current_reducer
from lqf_lightning.linear.top_curvature import top_curvature
from lqf_lightning.methods import Method
from lqf_lightning.methods.linearized_method import LinearizedMethod

_NETWORK_RATE = 0.01


def stable_rate(method: Method, batches: Sequence[Tensor]) -> float:
    r"""A learning rate for plain gradient descent; all ranks have to call this together.

    For a linear model, 1 over the largest curvature of the squared loss that any of the batches has, penalty included
    (`top_curvature`): half of what is stable on these, so that a batch may be twice as steep. Curvature depends
    on neither weights nor labels, so every model has the same. Cross-entropy is at most half as steep. For a network
    there is no such number, and the rate is 0.01.

    Args:
        method: The method.
        batches: Images of this rank (B, ...) by step, as many steps on every rank.

    Returns:
        The rate.
    """
    if not isinstance(method, LinearizedMethod):
        return _NETWORK_RATE
    ridge = method.ridge * max(method.penalty_weights().values(), default=0.0)
    tops = [
        top_curvature(method.linearized, [images] if len(images) else [], ridge=ridge, reducer=current_reducer())
        for images in batches
    ]
    return 1.0 / max(tops)


def descend(method: Method, batch: Batch, size: int, rate: float) -> None:
    """Move the trained weights of a method against the gradient of its loss and penalty.

    Args:
        method: The method.
        batch: Samples of this rank, possibly none.
        size: Samples of all ranks together.
        rate: Learning rate.
    """
    reducer = current_reducer()
    parameters: list[Tensor] = list(method.trained().values())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    if len(batch.target):
        share = method.loss(method(batch.input), batch.target) * (len(batch.target) / size)
        torch._foreach_add_(gradients, _gradients(share, parameters))
    for gradient in gradients:
        reducer.sum_(gradient)
    penalty = method.penalty()
    if isinstance(penalty, Tensor):
        torch._foreach_add_(gradients, _gradients(penalty, parameters))
    with torch.no_grad():
        torch._foreach_add_(parameters, gradients, alpha=-rate)


def _gradients(value: Tensor, parameters: list[Tensor]) -> list[Tensor]:
    found = torch.autograd.grad(value, parameters, allow_unused=True)
    return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]
