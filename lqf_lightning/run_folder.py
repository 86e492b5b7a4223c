"""What a run leaves behind, next to its checkpoints and pictures."""

import json
import logging
import math
import os
import pickle
import platform
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf

log = logging.getLogger(__name__)
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
    known = {**read_metrics(folder), **metrics}
    write_json(folder / "metrics.json", {name: _plain(value) for name, value in known.items()})


def read_metrics(folder: Path) -> dict[str, float]:
    """The metrics that a run has written so far.

    Args:
        folder: The run folder.

    Returns:
        Names and values, NaN for null; empty before the first call of `write_metrics`.
    """
    path = folder / "metrics.json"
    written = json.loads(path.read_text()) if path.exists() else {}
    return {name: math.nan if value is None else value for name, value in written.items()}


@rank_zero_only
def forget_results(folder: Path) -> None:
    """Clear what an earlier run left in the folder that a fresh one would add to: its metrics, advice and W&B identity.

    Args:
        folder: The run folder.
    """
    for name in ("metrics.json", "outlook.json", "wandb_run_id"):
        (folder / name).unlink(missing_ok=True)


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
    steps = {path: _stored_step(path) for path in files}
    return max((path for path in files if steps[path] >= 0), key=lambda path: steps[path], default=None)


def _stored_step(path: Path) -> int:
    try:
        return int(torch.load(path, map_location="cpu", weights_only=True, mmap=True)["global_step"])
    except (RuntimeError, OSError, EOFError, KeyError, pickle.UnpicklingError) as error:
        log.warning("%s cannot be read (%s): it is passed over", path, str(error).partition("\n")[0])
        return -1


def _plain(value: Any) -> float | None:
    number = float(value)
    return number if math.isfinite(number) else None
