import pytest

from lqf_lightning.backbones import create_backbone
from lqf_lightning.backbones.block_groups import block_groups


@pytest.mark.parametrize(
    ("name", "library", "expected"),
    [
        ("resnet18", "torchvision", ["stem", *(f"stage{s}.{b}" for s in (1, 2, 3, 4) for b in (0, 1)), "head"]),
        ("vgg11", "torchvision", ["stem", *(f"stage{s}" for s in range(1, 8)), "neck", "head"]),
        ("vit_tiny_patch16_224", "timm", ["stem", *(f"stage{s}" for s in range(1, 13)), "neck", "head"]),
    ],
)
def test_stages_are_divided_into_blocks(name, library, expected):
    assert list(block_groups(create_backbone(name, 3, library=library, weights=None))) == expected


def test_every_parameter_is_in_one_block_and_blocks_stay_whole():
    backbone = create_backbone("tf_efficientnet_lite0", 3, library="timm", weights=None)
    groups = block_groups(backbone)
    members = [name for names in groups.values() for name in names]
    assert sorted(members) == sorted(name for name, _ in backbone.model.named_parameters())
    assert {name.split(".")[2] for name in groups["stage4.1"]} == {"1"}
    assert {name.split(".")[1] for name in groups["stage4.1"]} == {"3"}
    assert groups["stage1"] == backbone.groups["stage1"]  # a stage of one block


def test_only_the_layer_groups_asked_for_are_divided():
    backbone = create_backbone("resnet18", 3, library="torchvision", weights=None)
    assert list(block_groups(backbone, ["stage4", "head"])) == ["stage4.0", "stage4.1", "head"]
