"""Name a network's parameters by depth: stem, stages, neck, head."""

import re
from dataclasses import dataclass

from torch import nn

# With more strided units than this they are single blocks, which a change of resolution then collects into stages.
_MOST_STAGES = 8


def layer_groups(model: nn.Module, head: str) -> dict[str, tuple[str, ...]]:
    """Partition the parameters into ``stem``, ``stage1`` ... ``stageN``, ``neck`` where there is one, and ``head``.

    Stages are the numbered children (``layer1``, ``stages.0``, ``features.3``) at the first level of the network that
    has at least two with inner structure. What lies between two of them, such as the norm and convolution that halve
    the resolution, belongs to the later one; what comes before them is the stem, and what comes after them, short of
    the head, is the neck. A long run of single blocks (MobileNetV2) is cut where the resolution changes; transformer
    blocks stay one stage each. Networks without blocks (VGG) have one stage per convolution.

    Args:
        model: A timm or torchvision classifier.
        head: Name of its last layer.

    Returns:
        Parameter names by group, in forward order; every parameter is in exactly one.
    """
    sections = next(filter(None, (_find_sections(model, head, "", structure) for structure in (2, 1, 0))), None)
    sections = sections or _Sections([name for name, _ in model.named_children()], [], [])
    stages = {f"stage{number}": parts for number, parts in enumerate(sections.stages, 1)}
    parts_of = {"stem": sections.stem, **stages, "neck": sections.neck, "head": [head]}
    group_of = {part: group for group, parts in parts_of.items() for part in parts}
    groups: dict[str, list[str]] = {group: [] for group in parts_of}
    for name, _ in model.named_parameters():
        owner = name
        while owner and owner not in group_of:
            owner = owner.rpartition(".")[0]
        groups[group_of.get(owner, "stem")].append(name)  # what no part owns is a token or an embedding
    return {group: tuple(names) for group, names in groups.items() if names}


@dataclass
class _Sections:
    """Names of submodules before the stages, in each of them, and after them."""

    stem: list[str]
    stages: list[list[str]]
    neck: list[str]


def _find_sections(model: nn.Module, head: str, level: str, structure: int) -> _Sections | None:
    # Stages are looked for below the submodule ``level``; each must have ``structure`` levels of layers within it.
    children = model.get_submodule(level).named_children()
    parts = {f"{level}.{key}".lstrip("."): part for key, part in children if any(True for _ in part.parameters())}
    deep = [
        name
        for name, part in parts.items()
        if _structure(part) >= structure and not f"{head}.".startswith(f"{name}.") and _mixes_channels(part)
    ]
    units = [name for name in deep if re.search(r"\d[a-z]?$", name)]  # layer1, stages.0, Mixed_5b
    if len(units) > 1:
        return _at_level(model, list(parts), units, attach_backwards=structure == 0)
    if not deep:
        return None
    trunk = max(deep, key=lambda name: sum(1 for _ in parts[name].parameters()))
    sections = _find_sections(model, head, trunk, structure)
    if sections is not None:
        at = list(parts).index(trunk)
        sections.stem[:0] = list(parts)[:at]
        sections.neck.extend(list(parts)[at + 1 :])
    return sections


def _at_level(model: nn.Module, parts: list[str], units: list[str], attach_backwards: bool) -> _Sections:
    strided = {name for name in units if _changes_resolution(model.get_submodule(name))}
    starts = strided | {units[0]} if len(units) > _MOST_STAGES and strided else set(units)
    first, last = parts.index(units[0]), parts.index(units[-1])
    stages: list[list[str]] = []
    between: list[str] = []
    for name in parts[first : last + 1]:
        if name in starts:
            stages.append([])
        if name in units or attach_backwards:
            stages[-1] += [*between, name]
            between = []
        else:
            between.append(name)
    neck = parts[last + 1 :]
    if attach_backwards:  # bare layers: the norm after the last convolution is its own, and the first one is the stem
        return _Sections(parts[:first] + stages[0], [*stages[1:-1], stages[-1] + neck], [])
    return _Sections(parts[:first], stages, neck)


def _structure(module: nn.Module) -> int:
    # A layer has no levels of layers within it, a convolution with its norm one, a residual block usually two.
    below = [_structure(part) for part in module.children() if any(True for _ in part.parameters())]
    return 1 + max(below) if below else 0


def _mixes_channels(module: nn.Module) -> bool:
    return any(parameter.ndim > 1 for parameter in module.parameters())


def _changes_resolution(module: nn.Module) -> bool:
    convolutions = (part for part in module.modules() if isinstance(part, nn.Conv2d))
    return any(max(convolution.stride) > 1 for convolution in convolutions)
