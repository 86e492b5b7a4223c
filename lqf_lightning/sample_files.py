"""The files that choose and weigh samples, kept with the run: it can be opened again when they are gone or changed."""

import shutil
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

_OPTIONS = ("subset", "weights")


def kept_file(folder: Path, option: str, file: str) -> Path:
    """Where a run keeps a file of its own.

    Args:
        folder: The run folder.
        option: "subset" or "weights".
        file: What ``data.subset`` or ``data.weights`` names.

    Returns:
        The place of the copy.
    """
    return folder / f"data_{option}{Path(file).suffix}"


@rank_zero_only
def keep_sample_files(config: DictConfig, folder: Path) -> None:
    """Copy ``data.subset`` and ``data.weights`` into the run folder.

    Args:
        config: The composed configuration.
        folder: The run folder; made if absent.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for option in _OPTIONS:
        if file := config.data.get(option):
            copy = kept_file(folder, option, file)
            if not (copy.exists() and copy.samefile(file)):
                shutil.copyfile(file, copy)


def use_kept_files(run: DictConfig, folder: Path) -> None:
    """Let a finished run read the copies that it has kept, wherever its folder has been moved since.

    Args:
        run: The configuration of the run, changed in place.
        folder: The run folder.
    """
    for option in _OPTIONS:
        file = run.data.get(option)
        if file and kept_file(folder, option, file).is_file():
            run.data[option] = str(kept_file(folder, option, file))


def refuse_changed_files(config: DictConfig, folder: Path) -> None:
    """Check that a run goes on with the samples and weights that it began with.

    Args:
        config: The composed configuration.
        folder: The run folder.

    Raises:
        ValueError: A file has been changed since.
    """
    for option in _OPTIONS:
        file = config.data.get(option)
        copy = None if not file else kept_file(folder, option, file)
        if copy is None or not copy.is_file() or not Path(file).is_file():
            continue
        if copy.read_bytes() != Path(file).read_bytes():
            raise ValueError(
                f"data.{option}={file} has been changed since the run in {folder} began. Bring it back from the copy "
                f"{copy.name} in that folder, or set hydra.run.dir to another folder, or ckpt_path=null to start over"
            )
