"""What the last layer sees."""

import torch
from torch import Tensor

from lqf_lightning.backbones.backbone import Backbone


def penultimate_features(backbone: Backbone, inputs: Tensor) -> Tensor:
    """Run the network and return what enters its head.

    The network runs as it stands (mode, gradients): put it in eval mode and under ``torch.no_grad()`` for fixed
    features.

    Args:
        backbone: The classifier.
        inputs: Images (B, 3, H, W).

    Returns:
        Features (B, F).

    Raises:
        ValueError: If the head is applied to every position of a feature map, which has no single feature vector.
    """
    seen: list[Tensor] = []
    head = backbone.model.get_submodule(backbone.head)
    handle = head.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    try:
        backbone.model(inputs)
    finally:
        handle.remove()
    (features,) = seen
    if max(features.shape[2:], default=1) > 1:
        raise ValueError(
            f"backbone.name={backbone.name}: its head sees a map of shape {tuple(features.shape)}, expected one vector "
            "per image. Choose another backbone.name=..."
        )
    return torch.flatten(features, 1)
