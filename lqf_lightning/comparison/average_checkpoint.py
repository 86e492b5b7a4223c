"""A chosen average as a run folder, which every command accepts."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from omegaconf import DictConfig, open_dict

from lqf_lightning.data import ImageDataModule
from lqf_lightning.references import open_reference
from lqf_lightning.resume import run_config
from lqf_lightning.run_folder import write_start
from lqf_lightning.teachers import FrozenTeacher, Reference
from lqf_lightning.teachers.frozen import fingerprint

_PREFIX = "model."  # what a method calls the network that it fine-tunes
_OF_TRAINING = ("optimizer_states", "lr_schedulers")  # belong to the weights of before


def write_average(
    folder: Path,
    average: FrozenTeacher,
    like: Path,
    data_config: DictConfig,
    data: ImageDataModule,
    origin: Mapping[str, Any],
) -> Path:
    """Write the configuration, the manifest and a checkpoint, as a run does.

    Args:
        folder: The folder to write.
        average: A plain network. Images are written to be of the size that it was measured with, whatever
            `data_config` says.
        like: Checkpoint of a fine-tuned network of the same classes, in the same order.
        data_config: Configuration of the data, under `data`.
        data: The data module.
        origin: Plain values to note in the checkpoint.

    Returns:
        The checkpoint.

    Raises:
        ValueError: The average is no plain network, or not that of the checkpoint.
    """
    if average.backbone is None:
        raise ValueError(f"{average.name} is no plain network, whose weights could be written. Set averages=null")
    state = average.backbone.model.state_dict()
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
        run.data.image_size, run.data.crop_fraction = average.view.image_size, average.view.crop_fraction
    write_start(folder, run)
    data.manifest.write(folder / "manifest.parquet")
    path = folder / "checkpoints" / "average.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(checkpoint, path)
    return path


def confirm_average(checkpoint: Path, measured: FrozenTeacher) -> Reference:
    """Open an average as every command does, and make sure that it is the one that was measured.

    Args:
        checkpoint: What `write_average` wrote.
        measured: The average that the reported numbers are of.

    Returns:
        The average, from its file.

    Raises:
        RuntimeError: The file holds a model that answers otherwise.
    """
    opened = open_reference(checkpoint)
    expected, found = _facts(measured), _facts(opened)
    if odd := [name for name in expected if expected[name] != found[name]]:
        raise RuntimeError(
            f"{checkpoint} does not hold the average that was measured; {odd[0]}: got {found[odd[0]]}, expected "
            f"{expected[odd[0]]}. The numbers reported are not this file's, which is a defect of lqf-compare. Set "
            "averages=null to compare without averages"
        )
    return opened


def _facts(model: Reference) -> dict[str, Any]:
    # The network's own hash: a checkpoint holds it within a method, which is hashed with it.
    network = getattr(model.backbone, "model", None) if isinstance(model, FrozenTeacher) else None
    own = "none" if network is None else fingerprint(network)
    return {"view": getattr(model, "view", None), "classes": model.classes, "weights": own}
