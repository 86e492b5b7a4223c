"""What every layer group hands on to the next one."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd

from lqf_lightning.backbones.backbone import Backbone


def group_features(backbone: Backbone, inputs: Tensor, groups: Sequence[str] | None = None) -> dict[str, Tensor]:
    """Run the network and return what leaves its layer groups, averaged over places or tokens.

    What leaves a group is what the first layer of the next group is given, sums of residual blocks and nonlinearities
    included; what leaves the head are the outputs. The network runs as it stands (mode, gradients): put it in eval mode
    and under ``torch.no_grad()`` for fixed features.

    Args:
        backbone: The classifier.
        inputs: Images (B, 3, H, W).
        groups: Names of layer groups; None takes all.

    Returns:
        Features (B, D_g) by group, in forward order.

    Raises:
        ValueError: A group is unknown, or the network runs without the layers of one.
    """
    names = list(backbone.groups)
    wanted = names if groups is None else [name for name in names if name in groups]
    if unknown := [name for name in groups or () if name not in names]:
        raise ValueError(f"unknown layer groups {unknown}, backbone.name={backbone.name} has {names}")
    entered: dict[str, Tensor] = {}
    handles = [
        layer.register_forward_pre_hook(_note(entered, group, layer))
        for group in names
        for layer in _layers(backbone, group)
    ]
    try:
        outputs: Tensor = backbone.model(inputs)
    finally:
        for handle in handles:
            handle.remove()
    if missing := [name for name in names if name not in entered]:
        raise ValueError(
            f"backbone.name={backbone.name} runs without the layers of {missing}, so that nothing can be said about "
            "what enters them. Choose another backbone.name=..."
        )
    left = dict(zip(names, [*(entered[name] for name in names[1:]), outputs], strict=True))
    return {name: left[name] for name in wanted}


def _layers(backbone: Backbone, group: str) -> list[nn.Module]:
    owners = dict.fromkeys(name.rpartition(".")[0] for name in backbone.groups[group])
    return [backbone.model.get_submodule(owner) for owner in owners if owner]  # tokens belong to the network itself


def _note(entered: dict[str, Tensor], group: str, layer: nn.Module) -> Callable[[nn.Module, tuple[Any, ...]], None]:
    def hook(_: nn.Module, arguments: tuple[Any, ...]) -> None:
        if group not in entered:
            entered[group] = _pool(arguments[0], layer)

    return hook


def _pool(activations: Tensor, layer: nn.Module) -> Tensor:
    # Convolutions and their norms have channels first, linear layers and layer norms last, unless a norm was made for
    # maps, which its width tells.
    first = isinstance(layer, _ConvNd | _BatchNorm | nn.GroupNorm)
    width = getattr(layer, "normalized_shape", None)
    if width is not None and activations.shape[-1] != width[-1]:
        first = True
    channels = 1 if first else activations.ndim - 1
    places = [axis for axis in range(1, activations.ndim) if axis != channels]
    return activations.mean(places) if places else torch.flatten(activations, 1)
