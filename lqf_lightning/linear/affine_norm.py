"""Evaluation-mode batch normalization in its own parameters, but differentiated as the affine map that it is."""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqf_lightning.linear.batch_norm import is_batch_norm


class AffineNorm(nn.Module):
    """A batch normalization whose backward pass multiplies by a constant, at a fraction of the cost of torch's own.

    Args:
        norm: The original, with which it shares every tensor; what follows it (drop-out, activation) comes along.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None
    running_mean: Tensor
    running_var: Tensor

    def __init__(self, norm: _BatchNorm) -> None:
        super().__init__()
        self.eps = norm.eps
        for name, parameter in norm._parameters.items():
            self.register_parameter(name, parameter)
        for name, buffer in norm._buffers.items():
            self.register_buffer(name, buffer)
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.eval()

    def normalize(self, x: Tensor) -> Tensor:
        """Shift and scale by the running statistics alone.

        Args:
            x: Activations (B, C, ...).

        Returns:
            What the weight multiplies.
        """
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return (x - self.running_mean.view(shape)) * (self.running_var + self.eps).rsqrt().view(shape)

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name for it
        """Apply the normalization and what follows it.

        Args:
            input: Activations (B, C, ...).

        Returns:
            Activations of the same shape.
        """
        scale = (self.running_var + self.eps).rsqrt()
        scale = scale if self.weight is None else scale * self.weight
        shift = -self.running_mean * scale
        shift = shift if self.bias is None else shift + self.bias
        shape = (1, -1) + (1,) * (input.ndim - 2)
        output = torch.addcmul(shift.view(shape), input, scale.view(shape))
        for child in self.children():
            output = child(output)
        return output


def use_affine_norms(network: nn.Module) -> nn.Module:
    """Exchange the batch normalizations of a network whose evaluation form is known.

    Args:
        network: A private copy in evaluation mode, changed in place.

    Returns:
        The network itself.
    """
    exchanged = {norm: AffineNorm(norm) for norm in network.modules() if isinstance(norm, _BatchNorm) and _fits(norm)}
    for parent in list(network.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, _BatchNorm) and child in exchanged:
                parent._modules[name] = exchanged[child]
    return network


def _fits(norm: _BatchNorm) -> bool:
    return is_batch_norm(norm) and norm.running_mean is not None and norm.running_var is not None
