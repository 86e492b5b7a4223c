"""A chosen average as a run folder, which every command accepts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict
from torch import Tensor

from lqf_lightning.data import ImageDataModule
from lqf_lightning.resume import run_config
from lqf_lightning.run_folder import write_start

_PREFIX = "model."  # what a method calls the network that it fine-tunes
_OF_TRAINING = ("optimizer_states", "lr_schedulers")  # belong to the weights of before


def classes_of(checkpoint: Path) -> list[str]:
    """Read the class names of a run.

    Args:
        checkpoint: A checkpoint of the run.

    Returns:
        Class names, in the order of the outputs.
    """
    stored = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)
    return list(stored["hyper_parameters"]["classes"])


def write_average(
    folder: Path,
    state: Mapping[str, Tensor],
    like: Path,
    data_config: DictConfig,
    data: ImageDataModule,
    origin: Mapping[str, Any],
) -> Path:
    """Write the configuration, the manifest and a checkpoint, as a run does.

    Args:
        folder: The folder to write.
        state: Weights and buffers of the network.
        like: Checkpoint of a fine-tuned network of the same classes, in the same order.
        data_config: Configuration of the data, under `data`.
        data: The data module.
        origin: Plain values to note in the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        ValueError: The state is not that of the checkpoint's network.
    """
    checkpoint = torch.load(like, map_location="cpu", weights_only=True)
    stored = checkpoint["state_dict"]
    if missing := {f"{_PREFIX}{name}" for name in state} ^ {name for name in stored if name.startswith(_PREFIX)}:
        raise ValueError(f"{like} is not of the same network as its average: {sorted(missing)[:5]}. Set averages=null")
    for name, entry in state.items():
        stored[f"{_PREFIX}{name}"] = entry.detach().cpu().to(stored[f"{_PREFIX}{name}"].dtype)
    checkpoint |= {name: [] for name in _OF_TRAINING} | {"callbacks": {}, "average": dict(origin)}
    run = run_config(like)
    with open_dict(run):
        run.data, run.paths.output_dir = data_config.data, str(folder)
    write_start(folder, run)
    data.manifest.write(folder / "manifest.parquet")
    path = folder / "checkpoints" / "average.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path
