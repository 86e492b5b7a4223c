"""The plain networks inside a run's checkpoint, apart from the projectors, teachers, queues and metrics around them."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from safetensors import safe_open
from torch import Tensor

_STUDENT = "student"


@dataclass(frozen=True)
class RunNetwork:
    """One network of a finished run, with the names that timm or torchvision give its tensors.

    Attributes:
        part: "student", or "teacher" for the averaged copy of self- and semi-supervised methods.
        state: Its tensors by the library's names, head included.
        classes: Class names, in the order of the head's outputs; empty if the checkpoint does not tell.
        head_is_trained: Whether the head has learned these classes; self-supervised methods leave it as it was drawn.
    """

    part: str
    state: dict[str, Tensor]
    classes: tuple[str, ...]
    head_is_trained: bool

    def for_classes(self, head: str, classes: Sequence[str] | None) -> "RunNetwork":
        """Keep of the head what is of use for some classes.

        Args:
            head: Name of the network's last layer.
            classes: The classes that are to be told apart, in the order of the outputs; None: whatever the head knows.

        Returns:
            This network with the rows of its head in the order of `classes`; without its head if that was not trained,
            or on other classes.
        """
        body = {key: tensor for key, tensor in self.state.items() if not key.startswith(f"{head}.")}
        if not self.head_is_trained:
            return replace(self, state=body)
        if not self.classes or classes is None or self.classes == (ours := tuple(classes)):
            return self
        if sorted(self.classes) != sorted(ours):
            return replace(self, state=body, head_is_trained=False)
        rows = [self.classes.index(name) for name in ours]
        return replace(self, classes=ours, state={k: t if k in body else t[rows] for k, t in self.state.items()})


def split_part(path: Path) -> tuple[Path, str | None]:
    """Split the name of a network in a checkpoint, ``FILE.ckpt@PART`` or ``FILE.ckpt#PART``.

    Hydra's command line takes ``#`` in quotes only, ``@`` as it is.

    Args:
        path: A file, with or without the name of a part.

    Returns:
        The file and the part, None where none is named. A file that exists under the whole name is that file.

    Example:
        >>> file, part = split_part(Path("run/checkpoints/last.ckpt@teacher"))
        >>> file.name, part
        ('last.ckpt', 'teacher')
    """
    named = re.fullmatch(r"(.+\.ckpt)[@#](\w*)", path.name)
    if named is None or path.is_file():
        return path, None
    return path.with_name(named[1]), named[2]


def network_in_run(content: Any, path: Path, part: str | None = None) -> RunNetwork | None:
    """Take one plain network out of a checkpoint of ours.

    Args:
        content: What the file holds.
        path: The file, for errors.
        part: "student" or "teacher"; None means the student.

    Returns:
        The network, or None if the file is no checkpoint of a run of ours.

    Raises:
        ValueError: If the network is linearized, if there is no such part, or if its tensors are missing.
    """
    prefixes = _prefixes(content)
    if prefixes is None:
        return None
    if not prefixes:
        raise ValueError(
            f"{path} is of a linearized network, f0 + J dw, which no set of weights of the plain network computes. "
            f"Evaluate it with lqf-eval checkpoint={path}, compare with it or learn from it with reference={path}, or "
            "give a checkpoint of method=finetune."
        )
    chosen = _STUDENT if part is None else part
    if chosen not in prefixes:
        raise ValueError(
            f"{path} has no part {chosen!r}, only {', '.join(prefixes)}. Set backbone.weights={path}@{_STUDENT} (in "
            f"lqf-export: part={_STUDENT}), or give a checkpoint of a method with an averaged teacher."
        )
    prefix = prefixes[chosen]
    state = {key.removeprefix(prefix): value for key, value in content["state_dict"].items() if key.startswith(prefix)}
    if not state:
        raise ValueError(
            f"{path} promises its {chosen} under {prefix!r} but holds no such tensor; it was changed after its run. "
            "Set another backbone.weights (in lqf-export: checkpoint)."
        )
    classes = tuple(map(str, content.get("hyper_parameters", {}).get("classes", ())))
    return RunNetwork(chosen, state, classes, bool(content.get("head_is_trained", True)))


def exported_network(state: dict[str, Tensor], path: Path) -> RunNetwork | None:
    """Recognize what ``lqf-export`` wrote with a trained head, by the file's metadata.

    Args:
        state: The tensors of the file.
        path: The file.

    Returns:
        The network, or None if the file is none of ours, or says nothing of classes.
    """
    if path.suffix != ".safetensors":
        return None
    with safe_open(path, "pt") as file:
        told = file.metadata() or {}
    if not {"lqf_lightning", "classes"} <= told.keys():
        return None
    return RunNetwork(told.get("part", _STUDENT), state, tuple(json.loads(told["classes"])), head_is_trained=True)


def _prefixes(content: Any) -> dict[str, str] | None:
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        return None
    networks = content.get("networks")
    if isinstance(networks, Mapping):
        return {str(name): str(prefix) for name, prefix in networks.items()}
    # Checkpoints from before the key: of linearized networks, or of ones whose every tensor is the plain network's.
    options, keys = content.get("hyper_parameters"), list(content["state_dict"])
    if not isinstance(options, Mapping) or "classes" not in options:
        return None
    if any(key.startswith("linearized.") for key in keys):
        return {}
    return {_STUDENT: "model."} if all(key.startswith("model.") for key in keys) else None
