import pytest
import timm
import torch
import torchvision
from torch import nn

from lqf_lightning.backbones.head import find_head, reset_head

HEADS = {
    ("timm", "tf_efficientnet_lite0"): "classifier",
    ("timm", "resnetv2_50"): "head.fc",  # a 1x1 convolution
    ("timm", "convnext_atto"): "head.fc",
    ("timm", "vit_tiny_patch16_224"): "head",
    ("torchvision", "resnet18"): "fc",
    ("torchvision", "mobilenet_v3_small"): "classifier.3",
    ("torchvision", "squeezenet1_1"): "classifier.1",
    ("torchvision", "swin_t"): "head",
}


@pytest.mark.parametrize(("library", "name"), HEADS)
def test_the_layer_that_makes_the_logits_is_found(library: str, name: str) -> None:
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    model = build(name, num_classes=5)
    head = find_head(model, 5, name)
    assert head == HEADS[library, name]
    assert model.get_parameter(f"{head}.weight").shape[0] == 5


def test_a_distilled_network_is_refused_by_its_heads() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=5)
    with pytest.raises(ValueError, match=r"has 2 heads \(head, head_dist\).*backbone\.name=deit_tiny_patch16_224"):
        find_head(model, 5, "deit_tiny_distilled_patch16_224")


def test_a_network_that_ends_in_something_else_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"backbone\.name=odd: no final .* 5 outputs"):
        find_head(nn.Sequential(nn.Linear(4, 7), nn.ReLU()), 5, "odd")


def test_a_new_head_is_normal_with_the_given_deviation_and_without_bias() -> None:
    layer = nn.Linear(100, 400)
    reset_head(nn.Sequential(layer), "0", 0.3)
    weight, bias = layer.weight, layer.bias
    # 40000 draws: the sample deviation is off by 0.3 / sqrt(80000) = 0.001, the mean by 0.0015; five of them allowed.
    assert abs(weight.std().item() - 0.3) < 0.006
    assert abs(weight.mean().item()) < 0.0075
    assert torch.count_nonzero(bias) == 0


@pytest.mark.parametrize("std", [0.0, -1.0, float("nan")])
def test_a_zero_head_is_refused_because_nothing_behind_it_would_learn(std: float) -> None:
    with pytest.raises(ValueError, match=r"backbone\.head_std.*linear probe"):
        reset_head(nn.Sequential(nn.Linear(2, 2)), "0", std)
