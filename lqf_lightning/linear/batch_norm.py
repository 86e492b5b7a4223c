"""Evaluation-mode batch normalization as what it is: a fixed affine map of its channels.

With running mean `m`, running variance `v` and affine parameters `gamma`, `beta`, evaluation-mode batch
normalization is `y = gamma (x - m) / sqrt(v + eps) + beta`. Behind a convolution `W a + b` it disappears into it:

    W' = s W,   b' = beta + s (b - m),   s = gamma / sqrt(v + eps)

and, since both are linear in a direction `d` of the original parameters, so do the tangents:

    dW' = s dW + (dgamma / sqrt(v + eps)) W,   db' = dbeta + dgamma (b - m) / sqrt(v + eps) + s db
"""

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm


def is_batch_norm(module: nn.Module) -> bool:
    """Tell whether a module is a batch normalization whose evaluation form is known here.

    Args:
        module: Any module.

    Returns:
        True for torch's own classes, and for subclasses that only append drop-out and an activation
        (timm's `BatchNormAct2d`: children `drop` and `act`).
    """
    if not isinstance(module, _BatchNorm):
        return False
    children = [name for name, _ in module.named_children()]
    return type(module).__module__.startswith("torch.nn.") or children == ["drop", "act"]


class NormConstants:
    """The constants of one evaluation-mode batch normalization, for its values and for its tangents.

    Attributes:
        inverse: `1 / sqrt(v + eps)` (C,).
        scale: `gamma / sqrt(v + eps)` (C,).
        center: `(b - m) / sqrt(v + eps)` (C,), the value that multiplies `gamma`; `b` is the bias added before.
        shift: `beta + gamma * center` (C,).
    """

    def __init__(self, norm: _BatchNorm, bias: Tensor | None = None) -> None:
        mean, variance = norm.running_mean, norm.running_var
        if mean is None or variance is None:
            raise ValueError("this batch normalization keeps no running statistics, so it has no evaluation form")
        wide = torch.float32 if mean.device.type == "mps" else torch.float64
        self.inverse = (variance.to(wide) + norm.eps).rsqrt()
        weight = torch.ones_like(self.inverse) if norm.weight is None else norm.weight.to(wide)
        offset = torch.zeros_like(self.inverse) if norm.bias is None else norm.bias.to(wide)
        center = -mean.to(wide) if bias is None else bias.to(wide) - mean.to(wide)
        self.scale = weight * self.inverse
        self.center = center * self.inverse
        self.shift = offset + weight * self.center

    def cast_(self, dtype: torch.dtype) -> None:
        """Round the constants once, after all of them were formed in double precision.

        Args:
            dtype: Type of the parameters that they will multiply.
        """
        for name in ("inverse", "scale", "center", "shift"):
            setattr(self, name, getattr(self, name).to(dtype))


class FrozenNorm(nn.Module):
    """What remains of an evaluation-mode batch normalization in a folded network.

    Its affine map where no convolution could absorb it, cast to the type of the input (so that autocast sees one
    type), then whatever the original class ran behind it (drop-out, activation) under the original names.
    """

    weight: nn.Parameter | None
    bias: nn.Parameter | None

    def __init__(self, norm: _BatchNorm, absorbed: bool) -> None:
        super().__init__()
        for name in ("weight", "bias"):
            empty = None if absorbed else nn.Parameter(torch.zeros(norm.num_features), requires_grad=False)
            self.register_parameter(name, empty)
        for name, child in norm.named_children():
            self.add_module(name, child)
        self.eval()

    def forward(self, input: Tensor) -> Tensor:  # noqa: A002 - torch's own name for it
        """Apply the affine map, if any is left, and the modules behind it.

        Args:
            input: Activations (B, C, ...).

        Returns:
            Activations of the same shape.
        """
        output = input
        if self.weight is not None and self.bias is not None:
            shape = (1, -1) + (1,) * (input.ndim - 2)
            weight, bias = self.weight.to(input.dtype).view(shape), self.bias.to(input.dtype).view(shape)
            output = torch.addcmul(bias, input, weight)
        for child in self.children():
            output = child(output)
        return output
