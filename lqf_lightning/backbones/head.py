"""Find and renew the last layer of a classifier."""

import math

import torch
from torch import nn


def find_head(model: nn.Module, num_classes: int, name: str) -> str:
    """Name the layer that produces the logits.

    timm states it in the model's configuration; in torchvision's classifiers it is the last layer with a weight matrix.

    Args:
        model: A timm or torchvision classifier.
        num_classes: Number of logits C, which the layer must have.
        name: The architecture's name, for the error.

    Returns:
        The layer's name in ``model.named_modules()``.

    Raises:
        ValueError: If the network has several heads (distilled transformers) or none with C outputs.
    """
    stated = getattr(model, "pretrained_cfg", {}).get("classifier")
    if isinstance(stated, list | tuple):
        raise ValueError(
            f"backbone.name={name} has {len(stated)} heads ({', '.join(stated)}); expected an architecture with one, "
            "so not a distilled one. Choose another, for example backbone.name=deit_tiny_patch16_224."
        )
    layers = {key: module for key, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)}
    found: str = stated if stated is not None else next(reversed(layers), "")
    if found not in layers or layers[found].weight.shape[0] != num_classes:
        raise ValueError(
            f"backbone.name={name}: no final Linear or Conv2d layer with {num_classes} outputs was found "
            f"(looked at {found!r}). Choose another architecture with backbone.name=..."
        )
    return found


@torch.no_grad()
def reset_head(model: nn.Module, head: str, std: float) -> None:
    """Draw a new head: weights from N(0, std^2) with torch's global generator, bias zero.

    A zero head would make the gradient of every other layer vanish at the starting point, so that a linearized network
    silently becomes a linear probe; hence ``std`` must be positive.

    Args:
        model: The classifier, changed in place.
        head: Name of its last layer.
        std: Standard deviation of the new weights.

    Raises:
        ValueError: If ``std`` is not a positive finite number.
    """
    if not 0 < std < math.inf:
        raise ValueError(
            f"got backbone.head_std={std}, expected a positive number: behind a zero head no other layer has a "
            "gradient, so the linearized network would be a linear probe. Set backbone.head_std=0.02."
        )
    layer = model.get_submodule(head)
    nn.init.normal_(layer.get_parameter("weight"), std=std)
    if isinstance(layer.bias, nn.Parameter):
        nn.init.zeros_(layer.bias)
