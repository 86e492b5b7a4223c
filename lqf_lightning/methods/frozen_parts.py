"""Parts of a network that training must not touch."""

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm


def keep_frozen_parts_in_eval(model: nn.Module, batch_norm_frozen: bool = False) -> None:
    """Put modules whose parameters all stay as they are in eval mode: no batch statistics, no dropout.

    Args:
        model: The network, in training mode.
        batch_norm_frozen: Whether every batch norm keeps its running statistics, trained or not.
    """
    for module in model.modules():
        own = list(module.parameters())
        untouched = bool(own) and not any(parameter.requires_grad for parameter in own)
        if untouched or (batch_norm_frozen and isinstance(module, _BatchNorm)):
            module.eval()
