"""Published architectures, whose operators fail forward mode in every known way."""

from typing import Any

import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lqf_lightning.linear import LinearizedModel

FAST = [  # library, name, input size, mode, (pairs, lone normalizations)
    ("torchvision", "resnet18", 32, "jvp", (20, 0)),
    ("torchvision", "densenet121", 32, "jvp", (59, 62)),
    ("torchvision", "mobilenet_v3_small", 32, "vjp", (34, 0)),
    ("torchvision", "swin_v2_t", 32, "vjp", (0, 0)),
    ("timm", "resnetv2_50", 32, "jvp", (32, 17)),
    ("timm", "convnextv2_atto", 32, "jvp", (0, 0)),
    ("timm", "test_vit", 160, "jvp", (0, 0)),
    ("timm", "tf_efficientnet_lite0", 32, "jvp", (49, 0)),
    ("timm", "levit_128s", 224, "jvp", (4, 48)),
]
SLOW = [
    *(("torchvision", name, size) for name, size in [
        ("resnet50", 64), ("densenet121", 64), ("mobilenet_v3_small", 64), ("efficientnet_b0", 64),
        ("convnext_tiny", 64), ("vit_b_32", 224), ("swin_t", 64), ("swin_v2_t", 64), ("regnet_y_400mf", 64),
        ("maxvit_t", 224), ("googlenet", 64),
    ]),
    *(("timm", name, size) for name, size in [
        ("vit_tiny_patch16_224", 224), ("resnetv2_50", 64), ("resnetv2_50x1_bit", 64), ("nfnet_f0", 64),
        ("convnextv2_atto", 64), ("mixer_s32_224", 224), ("eva02_tiny_patch14_224", 224),
        ("beit_base_patch16_224", 224),
        ("xcit_nano_12_p16_224", 224), ("coatnet_nano_rw_224", 224), ("levit_128s", 224), ("efficientvit_b0", 64),
        ("fastvit_t8", 64), ("mobilenetv4_conv_small", 64), ("resnet26d", 64), ("swinv2_cr_tiny_224", 224),
        ("poolformerv2_s12", 64), ("vit_small_patch14_dinov2", 112),
    ]),
]  # fmt: skip
NEEDS_REVERSE_MODE = {"mobilenet_v3_small", "swin_v2_t"}


def build(library: str, name: str, size: int) -> nn.Module:
    torch.manual_seed(0)
    options: dict[str, Any] = {}
    if library == "torchvision":
        if name == "googlenet":
            options = {"init_weights": False, "aux_logits": False}
        model: nn.Module = getattr(torchvision.models, name)(num_classes=5, **options)
    else:
        if name == "vit_small_patch14_dinov2":
            options = {"img_size": size}
        model = timm.create_model(name, num_classes=5, **options)
    for parameter in model.parameters():
        if parameter.ndim > 1 and not parameter.count_nonzero():
            nn.init.normal_(parameter, std=0.02)  # torchvision starts some heads at zero
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is not None:
            nn.init.normal_(module.running_mean, std=0.1)
            nn.init.uniform_(module.running_var, 0.8, 1.2)
    return model.eval()


def reverse_gradient(model: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    names = [name for name, _ in model.named_parameters()]
    output = model(x)
    gradients = torch.autograd.grad(output, list(model.parameters()), cotangent, allow_unused=True)
    zeros = (torch.zeros_like(p) for p in model.parameters())
    return {n: z if g is None else g for n, z, g in zip(names, zeros, gradients, strict=True)}


def check(model: nn.Module, x: Tensor) -> LinearizedModel:
    """The gradient of the linearized model equals plain reverse mode of the network, and its value the network's."""
    value, cotangent = model(x).detach(), torch.randn(len(x), 5, dtype=x.dtype)
    expected = reverse_gradient(model, x, cotangent)
    linear = LinearizedModel(model, example=x)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for delta in linear.deltas.values():
            delta.copy_(0.02 * torch.randn(delta.shape, generator=generator))
    output = linear(x)
    output.backward(cotangent)
    gap = sum((d.grad - expected[n]).double().square().sum() for n, d in linear.deltas.items() if d.grad is not None)
    size = sum(g.double().square().sum() for g in expected.values())
    # Rounding to double, amplified by the depth of the network and by normalizations over nearly constant maps.
    assert gap.sqrt() <= 1e-7 * size.sqrt()
    across = (cotangent * (output.detach() - value)).sum()
    back = sum((g * linear.deltas[n].detach()).sum() for n, g in expected.items())
    assert abs(across - back) <= 1e-7 * cotangent.norm() * (output.detach() - value).norm()
    return linear


@pytest.mark.parametrize(("library", "name", "size", "mode", "folded"), FAST, ids=[case[1] for case in FAST])
def test_family_is_linearized_exactly(library: str, name: str, size: int, mode: str, folded: tuple[int, int]) -> None:
    model = build(library, name, size).double()
    linear = check(model, torch.randn(2, 3, size, size, dtype=torch.float64))
    plan = linear._current(torch.zeros(0)).plan
    assert linear.mode == mode
    assert (len(plan.pairs), len(plan.affine)) == folded


@pytest.mark.slow
@pytest.mark.parametrize(("library", "name", "size"), SLOW, ids=[case[1] for case in SLOW])
def test_every_family_starts_in_the_expected_mode(library: str, name: str, size: int) -> None:
    linear = LinearizedModel(build(library, name, size), example=torch.randn(2, 3, size, size))
    assert linear.mode == ("vjp" if name in NEEDS_REVERSE_MODE else "jvp")
