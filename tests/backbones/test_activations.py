import pytest
import timm
import torch
import torchvision
from torch import Tensor, nn

from lqf_lightning.backbones import swap_activations


def test_slope_one_makes_a_network_of_convolutions_affine_in_its_input() -> None:
    model = timm.create_model("tf_efficientnet_lite0", num_classes=3).double().eval()
    relus = sum(isinstance(module, nn.ReLU6) for module in model.modules())
    assert swap_activations(model, 1.0) == relus == 33
    x, y = torch.randn(2, 1, 3, 32, 32, dtype=torch.float64)
    zero = torch.zeros_like(x)

    def f(images: Tensor) -> Tensor:
        with torch.no_grad():
            output: Tensor = model(images)
            return output

    scale = (f(x) - f(zero)).abs().max()
    assert ((f(x + y) - f(x) - f(y) + f(zero)).abs() <= 1e-12 * scale).all()
    assert scale > 0


def test_slope_zero_is_relu() -> None:
    model = torchvision.models.resnet18(num_classes=3).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        before = model(x)
        swap_activations(model, 0.0)
        assert torch.equal(model(x), before)


def test_relu6_loses_its_ceiling() -> None:
    model = nn.Sequential(nn.ReLU6())
    swap_activations(model, 0.1)
    assert model(torch.tensor([-10.0, 3.0, 9.0])).tolist() == [-1.0, 3.0, 9.0]


def test_inplace_is_kept_and_an_activation_under_two_names_is_swapped_under_both() -> None:
    model = nn.Module()
    model.first = model.second = nn.ReLU(inplace=True)
    model.third = nn.ReLU()
    assert swap_activations(model, 0.1) == 3
    assert [child.inplace for child in (model.first, model.second, model.third)] == [True, True, False]
    assert isinstance(model.second, nn.LeakyReLU)


def test_a_network_without_relu_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.leaky_slope=0\.1, but the network has no ReLU"):
        swap_activations(nn.Sequential(nn.GELU()), 0.1)


def test_a_slope_outside_of_the_unit_interval_is_refused() -> None:
    with pytest.raises(ValueError, match=r"backbone\.leaky_slope=-0\.1, expected a number in \[0, 1\]"):
        swap_activations(nn.Sequential(nn.ReLU()), -0.1)
