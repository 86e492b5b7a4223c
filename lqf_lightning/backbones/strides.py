"""Read ResNet v1 weights: the stride sits in a bottleneck's first convolution."""

import timm.models.resnet
import torchvision.models.resnet
from torch import nn

_BOTTLENECKS = (timm.models.resnet.Bottleneck, torchvision.models.resnet.Bottleneck)


def move_strides_to_1x1(model: nn.Module) -> int:
    """Give every bottleneck's stride to its 1x1 convolution.

    The original ResNet, and the weights that Caffe and Keras publish, halve the resolution in a bottleneck's first
    convolution (1x1); timm and torchvision do it in the second (3x3), known as v1.5. The shapes of the weights agree,
    so only accuracy tells when the wrong one is used.

    Args:
        model: A ResNet with bottlenecks, changed in place.

    Returns:
        Number of bottlenecks changed.

    Raises:
        ValueError: If the network has none with a stride.
    """
    moved = 0
    for block in model.modules():
        if isinstance(block, _BOTTLENECKS) and max(block.conv2.stride) > 1:
            block.conv1.stride, block.conv2.stride = block.conv2.stride, block.conv1.stride
            moved += 1
    if not moved:
        raise ValueError(
            "got backbone.stride_in_1x1=true, but the network has no strided ResNet bottleneck (ResNet-50 and deeper "
            "have). Set backbone.stride_in_1x1=false."
        )
    return moved
