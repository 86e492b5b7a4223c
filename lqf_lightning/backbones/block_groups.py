"""Divide the stages of a network into their residual blocks."""

from collections.abc import Iterable

from torch import nn

from lqf_lightning.backbones.backbone import Backbone

_CONTAINERS = (nn.Sequential, nn.ModuleList)


def block_groups(backbone: Backbone, groups: Iterable[str] | None = None) -> dict[str, tuple[str, ...]]:
    """Partition the parameters of layer groups by block: what a container of layers holds one after the other.

    A stage of several blocks becomes ``stage4.0``, ``stage4.1`` and so on, in forward order; stem, neck and head, and
    stages that are one block or hold bare layers, keep their names. Blocks are looked for below containers
    (`Sequential`, `ModuleList`) only, so that the layers of a block stay together.

    Args:
        backbone: The network.
        groups: Names of layer groups; None takes all.

    Returns:
        Parameter names by group, in forward order; every parameter of the layer groups is in exactly one.
    """
    result: dict[str, tuple[str, ...]] = {}
    for group in backbone.groups if groups is None else groups:
        names = backbone.groups[group]
        if not group.startswith("stage"):
            result[group] = names
            continue
        blocks: dict[str, list[str]] = {}
        for name in names:
            blocks.setdefault(_block(backbone.model, name), []).append(name)
        if len(blocks) == 1 or any(_is_layer(backbone.model, block) for block in blocks):
            result[group] = names
        else:
            result |= {f"{group}.{number}": tuple(members) for number, members in enumerate(blocks.values())}
    return result


def _block(model: nn.Module, parameter: str) -> str:
    # The first module on the way down that is more than a container of others.
    path, module = "", model
    for step in parameter.split(".")[:-1]:
        if path and not isinstance(module, _CONTAINERS):
            break
        path, module = f"{path}.{step}".lstrip("."), module.get_submodule(step)
    return path


def _is_layer(model: nn.Module, path: str) -> bool:
    return not any(True for _ in model.get_submodule(path).children())
