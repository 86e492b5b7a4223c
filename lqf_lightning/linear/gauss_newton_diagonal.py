"""The diagonal of the Gauss-Newton matrix, for parameters without Kronecker structure.

`diag H = (1/N) sum_i sum_k (J_i[k])^2`, elementwise: normalization gains, positional embeddings, layer scales and
whatever else is no dense or convolutional layer.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from lqf_lightning.linear.attention import math_attention


def sum_squared_jacobian(
    network: nn.Module, names: Sequence[str], x: Tensor, cotangents: Tensor, chunk: int = 8
) -> dict[str, Tensor]:
    """Sum the squared entries of `v^T J_i` over samples and cotangents.

    Args:
        network: Network in evaluation mode.
        names: Parameters to differentiate; nothing else is.
        x: Input (B, ...).
        cotangents: Cotangents (V, B, C); the identity for the exact sum, random signs (V = 1) for an estimate.
        chunk: Samples in flight at once; each holds one gradient of the named parameters.

    Returns:
        One sum per parameter, shaped like it.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> sum_squared_jacobian(layer, ["weight"], torch.tensor([[1.0, 2.0], [3.0, 0.0]]), torch.ones(1, 2, 1))
        {'weight': tensor([[10.,  4.]])}
    """
    frozen = {name: parameter.detach() for name, parameter in network.named_parameters()}
    moving = {name: frozen[name] for name in names}
    rest = {name: parameter for name, parameter in frozen.items() if name not in moving}

    def squares(sample: Tensor, directions: Tensor) -> dict[str, Tensor]:
        def run(parameters: dict[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(network, {**rest, **parameters}, (sample.unsqueeze(0),))
            return output.squeeze(0)

        _, pull, *_ = vjp(run, moving)
        total = {name: torch.zeros_like(parameter) for name, parameter in moving.items()}
        for direction in directions:
            (gradient,) = pull(direction)
            total = {name: total[name] + gradient[name].square() for name in total}
        return total

    sums = {name: torch.zeros_like(parameter) for name, parameter in moving.items()}
    with math_attention():  # the fused kernels have no batching rule either
        for part, directions in zip(torch.split(x, chunk), torch.split(cotangents, chunk, 1), strict=True):
            rows = vmap(squares, in_dims=(0, 1), randomness="error")(part, directions)
            for name in sums:
                sums[name] += rows[name].sum(0)
    return sums
