"""A classifier together with what the rest of the package must know about it."""

from dataclasses import dataclass

from torch import nn


@dataclass(frozen=True)
class Backbone:
    """A plain timm or torchvision classifier and its facts.

    Attributes:
        name: The library's name of the architecture.
        model: The unwrapped network, images (B, 3, H, W) -> logits (B, C), with the library's own parameter names.
        mean: Channel means that images in [0, 1] are shifted by.
        std: Channel deviations that the shifted images are divided by.
        head: Name of the final layer, a ``Linear`` (a ``Conv2d`` in the few architectures that end in one).
        groups: Parameter names by depth: ``stem``, ``stage1`` ..., ``neck`` where there is one, ``head``.
        image_size: Side in pixels that the network was made for; attention networks accept no other.
        weights: Where the weights came from, in words.
    """

    name: str
    model: nn.Module
    mean: tuple[float, float, float]
    std: tuple[float, float, float]
    head: str
    groups: dict[str, tuple[str, ...]]
    image_size: int
    weights: str
