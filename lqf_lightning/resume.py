"""Going on with a run, or going back to it: from which checkpoint, with which configuration and samples."""

import logging
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from lqf_lightning.run_folder import newest_checkpoint

log = logging.getLogger(__name__)
_SAME = ("method._target_", "method.layers", "backbone.name")  # what a checkpoint and a run must share
_SAME_TEACHER = tuple(
    f"method.{name}"
    for name in ("teacher", "momentum", "momentum_schedule", "momentum_warmup", "sync_statistics", "queue_size")
)
_SAME_LABELS = (
    "data.label_fraction", "data.labels_per_class", "data.label_seed", "data.subset", "data.weights", "data.core",
    "data.part", "data.copies",
)  # fmt: skip
_SAME_NETWORK = ("backbone.leaky_slope", "backbone.pooling", "backbone.pooling_width")


def checkpoint_to_resume(config: DictConfig, folder: Path) -> Path | None:
    """The checkpoint that a run goes on from.

    Args:
        config: The composed configuration, with `ckpt_path`: "auto", a file, or null.
        folder: The run folder.

    Returns:
        The file, or None to start from the beginning.

    Raises:
        FileNotFoundError: The file is missing.
    """
    choice = config.ckpt_path
    if choice is None:
        return None
    if choice != "auto":
        if not Path(choice).is_file():
            raise FileNotFoundError(
                f"no checkpoint at {Path(choice).absolute()}. Set ckpt_path to one, to auto (the newest of the run "
                "folder) or to null (start over)"
            )
        _refuse_other_run(config, Path(choice).absolute().parent.parent)
        return Path(choice)
    found = newest_checkpoint(folder)
    if found:
        _refuse_other_run(config, folder)
        log.info("resuming from %s", found)
    return found


def _refuse_other_run(config: DictConfig, folder: Path) -> None:
    # Half a run with one teacher or activation, or with some labels or samples, and half with others is neither.
    if not (folder / "config.yaml").exists():
        return
    earlier = OmegaConf.load(folder / "config.yaml")
    for key in (*_SAME, *_SAME_TEACHER, *_SAME_LABELS, *_SAME_NETWORK):
        group, _, name = key.rpartition(".")
        if key not in _SAME and name not in (OmegaConf.select(earlier, group) or {}):
            continue  # written by an earlier version
        was, now = OmegaConf.select(earlier, key), OmegaConf.select(config, key)
        if was != now:
            raise ValueError(
                f"{folder} holds a run with {key}={was}, which cannot go on with {key}={now}. Set hydra.run.dir to "
                "another folder, or ckpt_path=null to start over in this one"
            )


def keep_indices(config: DictConfig, folder: Path) -> None:
    """Let samples keep the indices of a run's manifest, whatever happened to their files since.

    Args:
        config: Configuration with a `data` group, changed in place.
        folder: The run folder that may hold ``manifest.parquet``.
    """
    written = folder / "manifest.parquet"
    if "manifest" in config.data and config.data.manifest is None and written.exists():
        config.data.manifest = str(written)


def make_paths_absolute(config: DictConfig) -> None:
    """Make the written configuration mean the same from every directory.

    Args:
        config: The composed configuration, changed in place.
    """
    for key in ("data.source.root", "backbone.weights", "data.manifest", "data.subset", "data.weights"):
        value = OmegaConf.select(config, key)
        if isinstance(value, str) and value not in ("default", "package"):
            OmegaConf.update(config, key, str(Path(value).expanduser().absolute()))
    core = OmegaConf.select(config, "data.core")
    if isinstance(core, str) and Path(core).expanduser().is_file():
        config.data.core = str(Path(core).expanduser().absolute())
    if config.get("reference") is not None:
        config.reference = _absolute_reference(config.reference)
    for callback in (config.get("callbacks") or {}).values():
        if callback and callback.get("references"):
            callback.references = {name: _absolute_reference(spec) for name, spec in callback.references.items()}


def _absolute_reference(spec: Any) -> Any:
    if OmegaConf.is_list(spec):
        return [_absolute_reference(entry) for entry in spec]
    is_path = isinstance(spec, str) and spec.endswith((".ckpt", ".parquet"))
    return str(Path(spec).expanduser().absolute()) if is_path else spec


def run_config(checkpoint: Path) -> DictConfig:
    """The configuration of the run that wrote a checkpoint.

    Args:
        checkpoint: A file in the ``checkpoints`` folder of a run.

    Returns:
        The resolved configuration.

    Raises:
        FileNotFoundError: There is no such file, or no ``config.yaml`` beside its folder.
    """
    if not checkpoint.is_file():
        near = sorted(str(path) for path in checkpoint.parent.glob("*.ckpt")) or "none in that folder"
        raise FileNotFoundError(
            f"no checkpoint at {checkpoint}; found {near}. Set checkpoint=RUN/checkpoints/best.ckpt"
        )
    written = checkpoint.parent.parent / "config.yaml"
    if not written.is_file():
        raise FileNotFoundError(
            f"{checkpoint} lies in no run folder: {written} is missing. Give a checkpoint inside the folder that "
            "lqf-train wrote, RUN/checkpoints/NAME.ckpt"
        )
    config = OmegaConf.load(written)
    assert isinstance(config, DictConfig)  # noqa: S101 the file was written by us from one
    return config
