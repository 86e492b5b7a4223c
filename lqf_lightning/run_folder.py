"""What a run leaves behind, next to its checkpoints and pictures."""

import json
import math
import os
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

_PACKAGES = (
    "lqf-lightning",
    "torch",
    "torchvision",
    "lightning",
    "torchmetrics",
    "timm",
    "hydra-core",
    "omegaconf",
    "wandb",
    "numpy",
)


@rank_zero_only
def write_start(folder: Path, config: DictConfig) -> None:
    """Write the resolved configuration, the command line and the package versions.

    Args:
        folder: The run folder; made if absent.
        config: The whole configuration.
    """
    folder.mkdir(parents=True, exist_ok=True)
    OmegaConf.save(config, folder / "config.yaml", resolve=True)
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:  # numpy is optional for torch
            versions[package] = "absent"
    write_json(folder / "environment.json", {"command": sys.argv, "versions": versions, "machine": platform.platform()})


@rank_zero_only
def write_metrics(folder: Path, metrics: Mapping[str, Any]) -> None:
    """Add metrics to ``metrics.json``; those of an earlier call stay. NaN is written as null.

    Args:
        folder: The run folder.
        metrics: Names and scalar values.
    """
    path = folder / "metrics.json"
    known = json.loads(path.read_text()) if path.exists() else {}
    known |= {name: _plain(value) for name, value in metrics.items()}
    write_json(path, known)


def write_json(path: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file that is never seen half-written.

    Args:
        path: The file.
        content: Plain values.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(content, indent=2, sort_keys=True, allow_nan=False) + "\n")
    partial.replace(path)


def newest_checkpoint(folder: Path) -> Path | None:
    """The checkpoint of the latest optimizer step, judged by the step stored inside; of several, the last written.

    Args:
        folder: The run folder, which holds ``checkpoints/*.ckpt``.

    Returns:
        The file, or None where there is none.
    """
    files = sorted((folder / "checkpoints").glob("*.ckpt"), key=os.path.getmtime, reverse=True)
    return max(files, key=_stored_step, default=None)


def _stored_step(path: Path) -> int:
    return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
