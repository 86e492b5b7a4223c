"""Loss and gradient of a network with other weights than its own, over the samples of all ranks."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor
from torch.func import functional_call

from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.data import Batch
from lqf_lightning.linear import current_reducer
from lqf_lightning.methods import Finetune

Tensors = dict[str, Tensor]
SampleLoss = Callable[[Tensor, Batch], Tensor]


def mean_gradient(
    method: Finetune, loss: SampleLoss, weights: Tensors, batches: Iterable[Batch], count: int
) -> tuple[float, Tensors]:
    """Loss and gradient of a network with other weights, in evaluation mode, over the samples of all ranks.

    Args:
        method: The method whose network it is; it is left alone.
        loss: Mean over a batch, of outputs and batch.
        weights: Those that train, by parameter name.
        batches: This rank's samples.
        count: Number of samples of all ranks.

    Returns:
        The mean loss and its gradient by parameter name, the same on every rank.
    """
    leaves = {name: weight.detach().clone().requires_grad_() for name, weight in weights.items()}
    total = next(iter(weights.values())).new_zeros(1 + sum(weight.numel() for weight in weights.values()))
    with evaluation_mode(method.model), torch.enable_grad():
        for batch in batches:
            if not len(batch.target):
                continue
            value = loss(functional_call(method.model, leaves, (batch.input,)), batch) * (len(batch.target) / count)
            slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True, materialize_grads=True)
            total += torch.cat([value.detach().reshape(1).to(total), *(slope.flatten() for slope in slopes)])
    current_reducer().sum_(total)
    parts = torch.split(total[1:], [weight.numel() for weight in weights.values()])
    return float(total[0]), {n: part.view_as(w) for (n, w), part in zip(weights.items(), parts, strict=True)}
