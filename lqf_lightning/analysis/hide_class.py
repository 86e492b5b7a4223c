"""The scrub that drops classes from the head: the network still knows them, and never says so."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]


def hide_class(weights: Mapping[str, Tensor], head: str, classes: Sequence[int], *, logit: float = -1e4) -> Tensors:
    """Give the outputs of some classes one low value for every image.

    Args:
        weights: By parameter name.
        head: Name of the last layer, whose weight and bias have one row per class.
        classes: Positions of the classes.
        logit: What their outputs become.

    Returns:
        New weights.

    Raises:
        ValueError: Weight or bias of the head are not among the weights.

    Example:
        >>> import torch
        >>> weights = {"fc.weight": torch.ones(2, 1), "fc.bias": torch.zeros(2)}
        >>> hide_class(weights, "fc", [1], logit=-9.0)
        {'fc.weight': tensor([[1.],
                [0.]]), 'fc.bias': tensor([ 0., -9.])}
    """
    names = (f"{head}.weight", f"{head}.bias")
    if missing := [name for name in names if name not in weights]:
        raise ValueError(
            f"a class is hidden by its row of the head and its bias, and {missing[0]!r} is not among the weights that "
            "train. Set callbacks.scrub.name=fisher"
        )
    place = torch.as_tensor(classes, dtype=torch.int64)
    hidden = {
        name: weights[name].index_fill(0, place.to(weights[name].device), value)
        for name, value in zip(names, (0.0, logit), strict=True)
    }
    return {**weights, **hidden}
