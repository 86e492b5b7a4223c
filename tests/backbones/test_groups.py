import pytest
import timm
import torch
import torchvision
from torch import nn

from lqf_lightning.backbones import layer_groups
from lqf_lightning.backbones.head import find_head

# Architecture, image side, number of stages, and what is in its neck.
FAMILIES = [
    ("timm", "tf_efficientnet_lite0", 32, 7, {"conv_head", "bn2"}),
    ("timm", "resnet18", 32, 4, set()),
    ("timm", "resnet50", 32, 4, set()),
    ("timm", "vit_tiny_patch16_224", 224, 12, {"norm"}),
    ("timm", "convnext_atto", 32, 4, {"head.norm"}),
    ("timm", "mobilenetv4_conv_small", 32, 5, {"conv_head", "norm_head"}),
    ("timm", "densenet121", 32, 4, {"features.norm5"}),
    ("timm", "resnetv2_50", 32, 4, {"norm"}),
    ("timm", "inception_v3", 96, 3, set()),
    ("timm", "vgg11", 32, 7, {"pre_logits.fc1", "pre_logits.fc2"}),
    ("timm", "mixer_s32_224", 224, 8, {"norm"}),
    ("torchvision", "resnet18", 32, 4, set()),
    ("torchvision", "resnet50", 32, 4, set()),
    ("torchvision", "efficientnet_b0", 32, 7, {"features.8.0", "features.8.1"}),
    ("torchvision", "mobilenet_v2", 32, 5, {"features.18.0", "features.18.1"}),
    ("torchvision", "mobilenet_v3_small", 32, 4, {"features.12.0", "features.12.1", "classifier.0"}),
    ("torchvision", "convnext_tiny", 32, 4, {"classifier.0"}),
    ("torchvision", "swin_t", 32, 4, {"norm"}),
    ("torchvision", "densenet121", 32, 4, {"features.norm5"}),
    ("torchvision", "regnet_y_400mf", 32, 4, set()),
    ("torchvision", "squeezenet1_1", 32, 8, set()),
    ("torchvision", "vgg11_bn", 32, 7, {"classifier.0", "classifier.3"}),
    ("torchvision", "vit_b_32", 224, 12, {"encoder.ln"}),
]


def _build(library: str, name: str) -> tuple[nn.Module, str]:
    build = timm.create_model if library == "timm" else torchvision.models.get_model
    model = build(name, num_classes=3).eval()
    return model, find_head(model, 3, name)


@pytest.mark.parametrize(("library", "name", "side", "stages", "neck"), FAMILIES)
def test_groups_partition_the_parameters_in_forward_order(
    library: str, name: str, side: int, stages: int, neck: set[str]
) -> None:
    model, head = _build(library, name)
    groups = layer_groups(model, head)
    assert list(groups) == ["stem", *(f"stage{i + 1}" for i in range(stages)), *(["neck"] if neck else []), "head"]
    assert {parameter.rpartition(".")[0] for parameter in groups.get("neck", ())} == neck
    assert groups["head"] == (f"{head}.weight", f"{head}.bias")
    grouped = [parameter for names in groups.values() for parameter in names]
    assert sorted(grouped) == sorted(parameter for parameter, _ in model.named_parameters())
    visited = _visited_groups(model, groups, side)
    assert visited == sorted(visited)
    assert set(visited) == set(range(len(groups)))


def _visited_groups(model: nn.Module, groups: dict[str, tuple[str, ...]], side: int) -> list[int]:
    number = {parameter: i for i, names in enumerate(groups.values()) for parameter in names}
    visited: list[int] = []
    for name, module in model.named_modules():
        own = [f"{name}.{key}".lstrip(".") for key, _ in module.named_parameters(recurse=False)]
        if own:
            module.register_forward_pre_hook(lambda *_, group=number[own[0]]: visited.append(group))
    with torch.no_grad():
        model(torch.zeros(1, 3, side, side))
    return visited


@pytest.mark.parametrize(
    ("library", "name", "group", "members"),
    [
        ("timm", "tf_efficientnet_lite0", "stem", {"conv_stem", "bn1"}),
        ("torchvision", "resnet18", "stem", {"conv1", "bn1"}),
        ("torchvision", "resnet18", "stage3", {"layer3"}),
        ("torchvision", "convnext_tiny", "stage2", {"features.2", "features.3"}),
        ("torchvision", "swin_t", "stage4", {"features.6", "features.7"}),
        ("torchvision", "densenet121", "stage2", {"features.transition1", "features.denseblock2"}),
        ("torchvision", "mobilenet_v2", "stage2", {"features.2", "features.3"}),
        ("torchvision", "vgg11_bn", "stage1", {"features.4", "features.5"}),
        ("timm", "vit_tiny_patch16_224", "stem", {"cls_token", "pos_embed", "patch_embed.proj"}),
    ],
)
def test_a_group_holds_what_belongs_together(library: str, name: str, group: str, members: set[str]) -> None:
    names = layer_groups(*_build(library, name))[group]
    found = {max((m for m in members if f"{parameter}.".startswith(f"{m}.")), default=parameter) for parameter in names}
    assert found == members


def test_a_network_without_stages_still_has_every_parameter_once() -> None:
    model = nn.Sequential(nn.Flatten(), nn.Linear(12, 3))
    assert layer_groups(model, "1") == {"head": ("1.weight", "1.bias")}
