"""Jacobian rows of single samples for any parameter, when nothing is known about where it sits."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.func import functional_call, vjp, vmap

from lqf_lightning.linear.attention import math_attention


def sample_rows(
    network: nn.Module,
    state: Mapping[str, Tensor],
    names: Sequence[str],
    x: Tensor,
    directions: Tensor,
    *,
    batched: bool = True,
    chunk: int = 8,
) -> dict[str, Tensor]:
    """Pull the same cotangents back through every sample by itself.

    Args:
        network: Network in evaluation mode.
        state: Its parameters and buffers by name, detached.
        names: Parameters to differentiate; nothing else is.
        x: Input (B, ...).
        directions: Cotangents (V, C); the identity gives the Jacobian.
        batched: Whether samples are vectorized over; False suits networks that cannot be, at several times the cost.
        chunk: Samples in flight at once.

    Returns:
        Rows (B, V, numel) by parameter.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> x = torch.tensor([[1.0, 2.0], [3.0, 0.0]])
        >>> sample_rows(layer, dict(layer.named_parameters()), ["weight"], x, torch.ones(1, 1))["weight"].tolist()
        [[[1.0, 2.0]], [[3.0, 0.0]]]
    """
    moving = {name: state[name].detach() for name in names}
    rest = {name: tensor.detach() for name, tensor in state.items() if name not in moving}

    def rows(sample: Tensor) -> dict[str, Tensor]:
        def run(parameters: dict[str, Tensor]) -> Tensor:
            output: Tensor = functional_call(network, {**rest, **parameters}, (sample.unsqueeze(0),))
            return output.squeeze(0)

        _, pull, *_ = vjp(run, moving)
        pulled = [pull(direction)[0] for direction in directions]
        return {name: torch.stack([gradient[name].flatten() for gradient in pulled]) for name in moving}

    with math_attention():  # the fused kernels have no batching rule either
        if batched:
            result: dict[str, Tensor] = vmap(rows, chunk_size=chunk, randomness="error")(x)
            return result
        single = [rows(sample) for sample in x]
    return {name: torch.stack([row[name] for row in single]) for name in moving}
