"""Leaky activations: every input keeps a derivative, as LQF's pre-training asks."""

from torch import nn


def swap_activations(model: nn.Module, slope: float) -> int:
    """Replace every ReLU and ReLU6 module by a leaky ReLU, ``x if x > 0 else slope * x``.

    LQF starts from a network pre-trained with leaky activations (Achille et al., "LQF: Linear Quadratic Fine-Tuning",
    CVPR 2021, section 4). Swapping them in a network pre-trained without changes its function: adapt it before use.
    ReLU6 loses its ceiling as well, so even slope 0 changes such a network; slope 0 leaves a ReLU network as it was.

    Args:
        model: The network, changed in place; inplace activations stay so. Activations that are called as functions
            inside a ``forward`` are not seen.
        slope: Derivative for negative inputs.

    Returns:
        Number of activations replaced.

    Raises:
        ValueError: If the slope is not in [0, 1] or there is nothing to replace.
    """
    if not 0 <= slope <= 1:
        raise ValueError(f"got backbone.leaky_slope={slope}, expected a number in [0, 1], or null for no change")
    swapped = 0
    for module in list(model.modules()):
        for name, child in module._modules.items():  # named_children() skips a module's second name
            if isinstance(child, nn.ReLU | nn.ReLU6):
                setattr(module, name, nn.LeakyReLU(slope, inplace=child.inplace))
                swapped += 1
    if not swapped:
        raise ValueError(
            f"got backbone.leaky_slope={slope}, but the network has no ReLU or ReLU6 module. Set backbone.leaky_slope="
            "null, or a backbone of the ResNet or EfficientNet-Lite families."
        )
    return swapped
