"""What a run keeps outside of its folder."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

_SHARED = {"cache_dir": "a cache that other runs may share", "subset": "a file of yours", "weights": "a file of yours"}

_PART = re.compile(r"[0-9a-f]{32}(\.\d+)?\.(safetensors|partial)$")  # as `TensorFolder` names them; others are yours


def kernel_files(folder: Path) -> list[Path]:
    """The parts of kernels that the run has assembled, wherever `method.kernel_folder` put them.

    Args:
        folder: The run folder.

    Returns:
        Files outside of the run folder; those inside need no search.
    """
    kept = _kernel_folder(folder)
    if kept is None or not kept.is_dir() or kept.resolve().is_relative_to(folder.resolve()):
        return []
    return sorted(file for file in kept.iterdir() if _PART.match(file.name))


def outside_places(folder: Path) -> list[str]:
    """Name what may hold the samples but is not ours to delete.

    Args:
        folder: The run folder.

    Returns:
        Places, each with the reason.
    """
    config, found = _config(folder), []
    for key, value in _leaves(config):
        name = key.rpartition(".")[2]
        file = Path(str(value)).expanduser()
        shared = name in _SHARED and value and key != "backbone.weights" and file.exists()
        if shared and not file.resolve().is_relative_to(folder.resolve()):
            found.append(f"{key}={value}: {_SHARED[name]}, outside of the run folder")
    kernel = (config.get("method") or {}).get("kernel_folder")
    kept = _kernel_folder(folder)
    if kernel and (kept is None or not kept.is_dir()):
        found.append(f"method.kernel_folder={kernel}: not found from here; delete it if it still exists")
    if any("wandb" in str(value).lower() for key, value in _leaves(config.get("logger") or {})):
        found.append("Weights & Biases: what was uploaded (tables, pictures, artifacts) has to be deleted there")
    return found


def _config(folder: Path) -> dict[str, Any]:
    file = folder / "config.yaml"
    content: Any = OmegaConf.to_container(OmegaConf.load(file)) if file.is_file() else {}
    return dict(content)


def _kernel_folder(folder: Path) -> Path | None:
    named = (_config(folder).get("method") or {}).get("kernel_folder")
    if not named:
        return None
    given = Path(named).expanduser()
    places = [given] if given.is_absolute() else [folder / given, Path.cwd() / given]
    return next((place for place in places if place.is_dir()), None)


def _leaves(content: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(content, dict):
        for name, value in content.items():
            yield from _leaves(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, content
