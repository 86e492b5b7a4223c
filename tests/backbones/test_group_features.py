import pytest
import torch
from torch import nn

from lqf_lightning.backbones import Backbone, create_backbone, penultimate_features
from lqf_lightning.backbones.group_features import group_features
from methods.tensors import build_backbone, draw


def test_groups_hand_on_what_the_next_one_is_given():
    backbone, (images, _) = build_backbone(), draw(5)
    found = group_features(backbone, images)
    assert list(found) == ["stem", "stage1", "head"]
    model = backbone.model
    stem = model.act1(model.bn1(model.conv1(images)))
    last = model.act2(model.bn2(model.conv2(stem)))
    assert torch.allclose(found["stem"], stem.mean((2, 3)))
    assert torch.allclose(found["stage1"], last.mean((2, 3)))
    assert torch.allclose(found["stage1"], penultimate_features(backbone, images))
    assert torch.allclose(found["head"], model(images))
    assert not any(module._forward_pre_hooks for module in model.modules())


class Tokens(nn.Module):
    """Tokens with channels last, then maps with channels first under the same kind of norm."""

    def __init__(self):
        super().__init__()
        self.token = nn.Parameter(torch.ones(1, 1, 3))
        self.lift = nn.Linear(3, 4)
        self.norm = nn.LayerNorm(4)
        self.maps = MapNorm(5)
        self.head = nn.Linear(5, 2)

    def forward(self, images):
        x = self.norm(self.lift(images.flatten(2).mT + self.token))
        x = torch.cat([x, x[..., :1]], -1).mT.unflatten(2, (6, 6))
        return self.head(self.maps(x).mean((2, 3)))


class MapNorm(nn.LayerNorm):
    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def test_tokens_and_maps_are_averaged_over_places():
    torch.manual_seed(0)
    model, (images, _) = Tokens().double(), draw(4)
    groups = {
        "stem": ("token", "lift.weight", "lift.bias"), "stage1": ("norm.weight", "norm.bias"),
        "neck": ("maps.weight", "maps.bias"), "head": ("head.weight", "head.bias"),
    }  # fmt: skip
    found = group_features(Backbone("tokens", model, (0.5,) * 3, (0.5,) * 3, "head", groups, 6, "random"), images)
    tokens = model.lift(images.flatten(2).mT + model.token)
    normed = model.norm(tokens).mean(1)
    assert torch.allclose(found["stem"], tokens.mean(1))
    assert torch.allclose(found["stage1"], torch.cat([normed, normed[:, :1]], 1))
    assert found["neck"].shape == (4, 5)
    assert torch.allclose(found["head"], model(images))


def test_groups_can_be_chosen_and_unknown_ones_are_refused():
    backbone, (images, _) = build_backbone(), draw(2)
    assert list(group_features(backbone, images, ["head", "stem"])) == ["stem", "head"]
    with pytest.raises(ValueError, match=r"unknown layer groups \['stage9'\]"):
        group_features(backbone, images, ["stage9"])


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_networks_of_the_library_have_features_for_every_group(name):
    backbone = create_backbone(name, 3, weights=None, image_size=32)
    size = backbone.image_size if "vit" in name else 32
    images = torch.randn(2, 3, size, size)
    backbone.model.eval()
    with torch.no_grad():
        found = group_features(backbone, images)
        last = list(found)[-2]
        if "vit" not in name:
            assert torch.allclose(found[last], penultimate_features(backbone, images), atol=1e-6)
    assert list(found) == list(backbone.groups)
    assert all(rows.ndim == 2 and len(rows) == 2 for rows in found.values())
