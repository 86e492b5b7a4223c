"""A method with other weights for a while."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor

from lqf_lightning.methods import Method


def trained_weights(method: Method) -> dict[str, Tensor]:
    """Copy what a method has trained.

    Args:
        method: The method.

    Returns:
        Copies by the names of `method.trained()`.
    """
    return {name: parameter.detach().clone() for name, parameter in method.trained().items()}


@contextmanager
def with_weights(method: Method, weights: Mapping[str, Tensor] | None) -> Iterator[None]:
    """Give a method other weights, and its own back at the end, whatever happens.

    Batch-norm statistics and whatever does not train are left as they are.

    Args:
        method: The method.
        weights: By the names of `method.trained()`, all of them; None leaves the method's own.

    Yields:
        Nothing.

    Raises:
        ValueError: Names or shapes are not those of the method.
    """
    parameters = method.trained()
    shapes = {name: parameter.shape for name, parameter in parameters.items()}
    if weights is not None and {name: weight.shape for name, weight in weights.items()} != shapes:
        odd = sorted(
            name for name in {*weights, *shapes} if name not in weights or weights[name].shape != shapes.get(name)
        )
        raise ValueError(
            f"the weights do not fit the method: {len(odd)} of {len(shapes)} parameters are missing, unknown or of "
            f"another shape (first: {odd[0]!r}). Set checkpoint to a run with the same backbone and method.layers"
        )
    own = trained_weights(method)
    try:
        _assign(parameters, weights or own)
        yield
    finally:
        _assign(parameters, own)


def _assign(parameters: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> None:
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(weights[name])
