"""The classes that published weights tell apart, whatever a task's own classes are."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torchvision

from lqf_lightning.backbones.head import find_head
from lqf_lightning.backbones.library import Architecture
from lqf_lightning.backbones.run_checkpoint import exported_network, network_in_run, split_part
from lqf_lightning.backbones.weight_file import read_weight_file

_IMAGENET = 1000


@dataclass(frozen=True)
class PublishedHead:
    """The last layer that comes with weights.

    Attributes:
        outputs: Number of its classes; 0 where the weights have no trained head.
        classes: Their names, in the order of the outputs; empty where the weights do not say.
    """

    outputs: int
    classes: tuple[str, ...] = ()


def published_head(architecture: Architecture, weights: str | Path) -> PublishedHead:
    """Find out about the head of some weights without loading them into a network.

    Args:
        architecture: What the weights are of.
        weights: The option ``backbone.weights``: ``default``, ``package``, or a file.

    Returns:
        Its facts. Of a file that does not exist it is that of ImageNet-1k: loading it will explain itself better.
    """
    if weights == "package":
        return PublishedHead(_IMAGENET)
    if weights == "default":
        return PublishedHead(_of_library(architecture))
    path, part = split_part(Path(weights).expanduser())
    if not path.is_file():
        return PublishedHead(_IMAGENET)
    content = read_weight_file(path)
    network = network_in_run(content, path, part) or exported_network(content, path)
    if network is not None:
        return PublishedHead(len(network.classes), network.classes) if network.head_is_trained else PublishedHead(0)
    return PublishedHead(_in_file(architecture, content))


def _of_library(architecture: Architecture) -> int:
    if architecture.library == "timm":
        config = timm.get_pretrained_cfg(architecture.name)
        return int(config.num_classes) if config is not None else 0
    return len(torchvision.models.get_model_weights(architecture.name).DEFAULT.meta["categories"])


def _in_file(architecture: Architecture, content: Any) -> int:
    head = find_head(architecture.build(_IMAGENET, None), _IMAGENET, architecture.name)
    while isinstance(content, dict) and (inner := next((k for k in ("state_dict", "model") if k in content), None)):
        content = content[inner]
    names = [str(key) for key in content] if isinstance(content, dict) else []
    # Wrappers such as DDP put prefixes before the name.
    found = [name for name in names if name == f"{head}.weight" or name.endswith(f".{head}.weight")]
    return int(content[found[0]].shape[0]) if found else 0
