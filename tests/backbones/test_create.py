import pytest
import torch

from lqf_lightning.backbones import create_backbone


def test_backbone_takes_the_normalization_of_its_library() -> None:
    lite = create_backbone("tf_efficientnet_lite0", 3, weights=None)
    assert (lite.mean, lite.std) == ((0.5,) * 3, (0.5,) * 3)
    resnet = create_backbone("resnet18", 3, weights=None)
    assert (resnet.mean, resnet.std) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))


def test_normalization_can_be_given_with_ones_own_weights() -> None:
    backbone = create_backbone("resnet18", 3, weights=None, mean=[0, 0, 0], std=[1, 1, 1])
    assert (backbone.mean, backbone.std) == ((0.0,) * 3, (1.0,) * 3)
    with pytest.raises(ValueError, match=r"backbone\.std=\[1\], expected three"):
        create_backbone("resnet18", 3, weights=None, std=[1])


def test_transformers_are_built_for_the_image_size() -> None:
    backbone = create_backbone("vit_tiny_patch16_224", 3, weights=None, image_size=32)
    assert backbone.image_size == 32
    assert backbone.model(torch.zeros(1, 3, 32, 32)).shape == (1, 3)
    own = create_backbone("vit_b_32", 3, weights=None, image_size=64)
    assert own.model(torch.zeros(1, 3, 64, 64)).shape == (1, 3)


def test_weights_are_reproduced_by_the_global_seed() -> None:
    def head(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        backbone = create_backbone("tf_efficientnet_lite0", 3, weights="package")
        return backbone.model.get_submodule(backbone.head).get_parameter("weight")

    assert torch.equal(head(1), head(1))
    assert not torch.equal(head(1), head(2))


def test_options_change_the_network() -> None:
    plain = create_backbone("resnet50", 3, weights=None)
    changed = create_backbone("resnet50", 3, weights=None, leaky_slope=0.1, stride_in_1x1=True, image_size=64)
    count = {module: sum(isinstance(m, module) for m in changed.model.modules()) for module in _activations()}
    assert count == {torch.nn.ReLU: 0, torch.nn.LeakyReLU: 17}
    assert changed.model.get_submodule("layer2.0.conv1").stride == (2, 2)
    assert plain.model.get_submodule("layer2.0.conv1").stride == (1, 1)


def _activations() -> tuple[type[torch.nn.Module], ...]:
    return (torch.nn.ReLU, torch.nn.LeakyReLU)


def test_groups_of_a_folded_network_hold_its_new_biases_and_no_norms() -> None:
    backbone = create_backbone("resnet18", 3, weights=None, fold_batch_norm=True, image_size=32)
    assert backbone.groups["stem"] == ("conv1.weight", "conv1.bias")
    assert not any("bn" in name for names in backbone.groups.values() for name in names)


def test_weights_are_told_apart_from_random_ones() -> None:
    assert create_backbone("resnet18", 3, weights=None).weights == "random"


def test_no_classes_are_refused() -> None:
    with pytest.raises(ValueError, match="num_classes=0"):
        create_backbone("resnet18", 0, weights=None)
