import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lqf_lightning.backbones import fold_batch_norm

# Architecture and number of its BatchNorms that follow something else than a convolution.
FAMILIES = {
    ("timm", "tf_efficientnet_lite0"): 0,
    ("timm", "resnet18"): 0,
    ("timm", "mobilenetv4_conv_small"): 0,
    ("timm", "regnety_002"): 0,
    ("timm", "ghostnet_100"): 0,
    ("torchvision", "resnet18"): 0,
    ("torchvision", "mobilenet_v2"): 0,
    ("torchvision", "mobilenet_v3_small"): 0,
    ("torchvision", "efficientnet_b0"): 0,
    ("torchvision", "shufflenet_v2_x0_5"): 0,
    ("torchvision", "densenet121"): 62,  # 58 before a dense layer's first convolution, 3 in transitions, 1 at the end
}


@pytest.mark.parametrize(("library", "name"), FAMILIES)
def test_a_folded_network_is_the_same_function(library: str, name: str) -> None:
    model = _with_statistics(library, name)
    norms = sum(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        folded = fold_batch_norm(model, torch.randn(1, 3, 64, 64, dtype=torch.float64))
        after = model(images)
    assert folded == norms - FAMILIES[library, name]
    assert before.std() > 0
    torch.testing.assert_close(after, before, rtol=0, atol=1e-12 * before.abs().max().item())


def _with_statistics(library: str, name: str) -> nn.Module:
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    return _randomized(build(name, num_classes=3).double().eval())


def _randomized(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor, low, high in zip(
                (module.weight, module.bias, module.running_mean, module.running_var),
                (0.7, -0.2, -0.2, 0.5),
                (1.3, 0.2, 0.2, 1.5),
                strict=True,
            ):
                assert tensor is not None
                nn.init.uniform_(tensor, low, high)
    return model


def test_the_bias_of_a_convolution_is_folded_in() -> None:
    conv = nn.Conv2d(3, 2, 1)
    nn.init.constant_(conv.get_parameter("bias"), 5.0)
    model = _randomized(nn.Sequential(conv, nn.BatchNorm2d(2)).double().eval())
    images = torch.randn(2, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        before = model(images)
        fold_batch_norm(model, images)
        torch.testing.assert_close(conv(images), before, rtol=0, atol=1e-12)


def test_folded_parameters_train() -> None:
    model = nn.Sequential(nn.Conv2d(3, 2, 1, bias=False), nn.BatchNorm2d(2)).eval()
    fold_batch_norm(model, torch.randn(2, 3, 4, 4))
    assert [(name, parameter.requires_grad) for name, parameter in model.named_parameters()] == [
        ("0.weight", True),
        ("0.bias", True),
    ]


def test_training_mode_is_refused() -> None:
    with pytest.raises(ValueError, match=r"call model\.eval\(\) first"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)), torch.randn(2, 3, 4, 4))


def test_a_network_without_a_pair_is_refused() -> None:
    with pytest.raises(ValueError, match=r"Set backbone\.fold_batch_norm=false"):
        fold_batch_norm(nn.Sequential(nn.Conv2d(3, 2, 1)).eval(), torch.randn(2, 3, 4, 4))


def test_a_convolution_that_is_also_read_elsewhere_is_refused() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 2, 1), nn.BatchNorm2d(2)

        def forward(self, images: Tensor) -> Tensor:
            features = self.conv(images)
            result: Tensor = self.norm(features) + features
            return result

    model = Branching().eval()
    nn.init.constant_(model.norm.weight, 3.0)
    with pytest.raises(RuntimeError, match="computes something else after folding"):
        fold_batch_norm(model, torch.randn(2, 3, 4, 4))
