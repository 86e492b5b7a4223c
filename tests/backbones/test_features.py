import pytest
import torch
from torch.nn import functional as F

from lqf_lightning.backbones import create_backbone, penultimate_features


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "convnext_atto", "resnetv2_50"])
def test_the_head_turns_the_features_into_the_logits(name: str) -> None:
    backbone = create_backbone(name, 3, weights=None)
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = penultimate_features(backbone, images)
        head = backbone.model.get_submodule(backbone.head)
        logits = F.linear(features, head.get_parameter("weight").flatten(1), head.get_parameter("bias"))
        torch.testing.assert_close(logits, backbone.model(images))


def test_no_hook_is_left_behind() -> None:
    backbone = create_backbone("resnet18", 3, weights=None)
    penultimate_features(backbone, torch.randn(1, 3, 32, 32))
    assert not backbone.model.get_submodule(backbone.head)._forward_pre_hooks


def test_a_head_that_runs_on_a_map_is_refused() -> None:
    backbone = create_backbone("squeezenet1_1", 3, weights=None)
    with pytest.raises(ValueError, match=r"backbone\.name=squeezenet1_1: its head sees a map .*\(1, 512, 3, 3\)"):
        penultimate_features(backbone, torch.randn(1, 3, 64, 64))
