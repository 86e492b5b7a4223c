"""A finished run, opened again with its samples and its network as they were before training."""

import logging
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict

from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.copies import refuse_copies
from lqf_lightning.methods import Method
from lqf_lightning.resume import keep_indices, make_paths_absolute, run_config
from lqf_lightning.run_folder import write_start
from lqf_lightning.sample_files import use_kept_files
from lqf_lightning.train import build_method

log = logging.getLogger(__name__)


def open_run(
    config: DictConfig, checkpoint: Path, folder: Path, *, manifest: Path | None = None
) -> tuple[DictConfig, ImageDataModule, Method]:
    """Rebuild the data and the method of a run, the latter at its pre-trained weights, for a command in a new folder.

    Args:
        config: Of the command: `trainer`, `callbacks`, `logger`, `progress` and `paths` take the place of the run's,
            `data` changes single options of it.
        checkpoint: Of the run.
        folder: That of the command; gets ``config.yaml`` and ``manifest.parquet``.
        manifest: Of the samples; None: that of the run.

    Returns:
        The changed configuration of the run, its data and its method. Samples keep their indices.
    """
    run = run_config(checkpoint)
    with open_dict(run):
        run.data = OmegaConf.merge(run.data, config.data)
        run.trainer, run.logger, run.progress = config.trainer, config.get("logger"), config.get("progress")
        run.callbacks, run.checkpoints, run.paths = config.get("callbacks"), None, config.paths
        if "source" not in config.data:
            run.data.manifest = None  # that of the run, wherever its folder has been moved since
        if manifest is not None:
            run.data.manifest = str(manifest)
    keep_indices(run, checkpoint.parent.parent)
    use_kept_files(run, checkpoint.parent.parent)
    make_paths_absolute(run)
    data, method = build_method(run)
    refuse_copies(data, "scores, choices and removals of single images")
    write_start(folder, run)
    rank_zero_only(data.manifest.write)(folder / "manifest.parquet")
    return run, data, method


def steps_taken(checkpoint: Path) -> tuple[int, int]:
    """Count the optimizer steps of the run that wrote a checkpoint.

    Args:
        checkpoint: In the ``checkpoints`` folder of the run.

    Returns:
        How far it has come by ``last.ckpt`` beside it if there is one, or by the checkpoint itself if it has more; and
        how many steps its schedule was laid out over.
    """
    found = []
    for file in {checkpoint, checkpoint.with_name("last.ckpt")}:
        if file.is_file():
            content: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
            taken = int(content["global_step"])
            found.append((taken, int(content.get("planned_steps") or taken)))
    return max(found)
