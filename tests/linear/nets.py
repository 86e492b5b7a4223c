import copy
from collections.abc import Callable

import torch
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn


class Residual(nn.Module):
    """Two convolutions around a shortcut; one activation module serves both places, as torchvision does it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.act = nn.LeakyReLU(0.1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.bn2 = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn2(self.conv2(self.act(self.bn1(self.conv1(x)))))
        out += x
        return self.act(out)


class PreActivated(nn.Module):
    """Depthwise separable block whose first normalization no convolution can absorb."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.bn0 = nn.BatchNorm2d(width)
        self.act = nn.ReLU6()
        self.depthwise = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.bn1 = nn.BatchNorm2d(width, affine=False)
        self.pointwise = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.pointwise(torch.nn.functional.silu(self.bn1(self.depthwise(self.act(self.bn0(x))))))


def head(width: int) -> list[nn.Module]:
    return [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 3)]


BUILD: dict[str, Callable[[], nn.Module]] = {
    "residual": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3, stride=2, bias=False), nn.BatchNorm2d(4), nn.LeakyReLU(0.1), Residual(4), *head(4)
    ),
    "depthwise": lambda: nn.Sequential(
        nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(), nn.MaxPool2d(2), PreActivated(6), *head(6)
    ),
    "transformer": lambda: VisionTransformer(
        img_size=8, patch_size=4, embed_dim=8, depth=2, num_heads=2, num_classes=3, class_token=True
    ),
}


def build_net(kind: str, dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    net = BUILD[kind]()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.4)
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.running_mean)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return net.eval().to(dtype)


def dense_jacobian(net: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Jacobian (B, C, *shape) by parameter: one reverse pass per output, no forward mode, no folding."""
    net = copy.deepcopy(net).eval().requires_grad_(True)
    named = dict(net.named_parameters())
    output = net(x)
    rows = [
        torch.autograd.grad(o, list(named.values()), retain_graph=True, allow_unused=True) for o in output.flatten()
    ]
    columns = zip(*rows, strict=True)
    return {
        name: torch.stack([torch.zeros_like(p) if g is None else g for g in column]).view(*output.shape, *p.shape)
        for (name, p), column in zip(named.items(), columns, strict=True)
    }


def random_direction(net: nn.Module, seed: int = 2) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {
        n: torch.randn(p.shape, generator=generator, dtype=torch.float64).to(p.dtype) for n, p in net.named_parameters()
    }


def push(jacobian: dict[str, Tensor], direction: dict[str, Tensor]) -> Tensor:
    """`J d` (B, C)."""
    return sum((jacobian[n].flatten(2) @ d.flatten() for n, d in direction.items()), torch.zeros(()))
