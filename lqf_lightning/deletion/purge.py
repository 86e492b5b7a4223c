"""Deleting what a finished run holds of samples that it has to forget."""

import shutil
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from lqf_lightning.data.manifest import Manifest
from lqf_lightning.deletion.filter_file import filter_file
from lqf_lightning.deletion.outside import kernel_files, outside_places
from lqf_lightning.deletion.traces import Traces

# Weights and everything that depends on all samples at once. Pictures show the samples, or curves that they shaped.
_FOLDERS = ("checkpoints", "wandb", "pictures")
_ENDINGS = (
    *(".ckpt", ".pt", ".pth", ".safetensors", ".npy", ".npz", ".wandb"),
    *(".png", ".jpg", ".jpeg", ".svg", ".pdf", ".partial"),
)
# Every row of these tables was computed from all samples: none is right without the cohort.
_JOINT = (
    *("sample_information", "leave_one_out", "memorization", "influence"),
    *("regularization_path", "forgetting_bounds"),
)
_OURS = ("forgetting.json", "certificate.json", "manifest.parquet")  # a purge that is interrupted needs them


@dataclass(frozen=True)
class Removed:
    """What a purge did.

    Attributes:
        deleted: Files and folders that are gone, by their names in the run folder, or whole where they lay outside.
        filtered: Files that lost the rows of the samples.
        not_inspected: What may still hold the samples and has to be looked at by a person, each with the reason.
    """

    deleted: list[str]
    filtered: list[str]
    not_inspected: list[str]


def purge_run(folder: Path, indices: Iterable[int], paths: Iterable[str], *, keep: Collection[str] = ()) -> Removed:
    """Delete from a run folder what holds the samples, and filter what can be filtered.

    Each step may be repeated, every file is replaced as a whole, and the manifest comes last: a purge that was
    interrupted at any point is finished by another call.

    Args:
        folder: The run folder; one that is gone is purged.
        indices: Of the samples.
        paths: Of the samples, as the manifest named them before it forgot them.
        keep: Names in the folder, of files or folders, that stay as they are.

    Returns:
        What was done, in this call.

    Raises:
        ValueError: The folder is not that of a run.
    """
    traces = Traces(indices, paths)
    removed = Removed([], [], [])
    if not folder.is_dir():
        return removed
    if not (folder / "config.yaml").is_file() or not (folder / "manifest.parquet").is_file():
        raise ValueError(f"{folder} is no run folder: config.yaml or manifest.parquet is missing. Nothing was deleted")
    removed.not_inspected.extend(outside_places(folder))
    for file in kernel_files(folder):
        _delete(file, folder, removed)
    for name in _FOLDERS:
        if name not in keep and (folder / name).exists():
            _delete(folder / name, folder, removed)
    for file in _files(folder, {*keep, *_OURS}):
        _treat(file, folder, traces, removed)
    _forget(folder / "manifest.parquet", traces, removed)
    return removed


def _treat(file: Path, folder: Path, traces: Traces, removed: Removed) -> None:
    name = file.relative_to(folder).as_posix()
    if file.is_symlink() and not (file.is_file() and _is_inside(file, folder)):
        removed.not_inspected.append(f"{name}: a link to {file.readlink()}, which is a folder, or not here")
        return
    if file.suffix.lower() in _ENDINGS or (file.suffix == ".parquet" and file.name.startswith(_JOINT)):
        _delete(file, folder, removed)
        return
    done = filter_file(file, traces)
    steps: dict[str, Callable[[], None]] = {
        "delete": lambda: _delete(file, folder, removed),
        "filtered": lambda: removed.filtered.append(name),
        "clean": lambda: None,
    }
    steps.get(done, lambda: removed.not_inspected.append(f"{name}: {done}"))()


def _delete(place: Path, folder: Path, removed: Removed) -> None:
    name = place.relative_to(folder).as_posix() if place.is_relative_to(folder) else str(place)
    if place.is_symlink() and place.exists() and not _is_inside(place, folder):
        removed.not_inspected.append(f"{place.resolve()}: {name} was a link to it, and only the link is deleted")
    if place.is_dir() and not place.is_symlink():
        shutil.rmtree(place)
    else:
        place.unlink(missing_ok=True)
    removed.deleted.append(name)


def _is_inside(place: Path, folder: Path) -> bool:
    return place.resolve().is_relative_to(folder.resolve())


def _files(folder: Path, keep: Collection[str]) -> Iterator[Path]:
    for file in sorted(folder.rglob("*")):
        parts = file.relative_to(folder).parts
        if parts[0] not in keep and "/".join(parts) not in keep and (file.is_file() or file.is_symlink()):
            yield file


def _forget(file: Path, traces: Traces, removed: Removed) -> None:
    if not file.is_file():
        return
    manifest = Manifest.read(file)
    buried = manifest.table.loc[manifest.forgotten, "index"]
    if left := sorted(traces.indices - set(buried.tolist())):
        manifest.forget(np.array(left, dtype=np.int64)).write(file)
        removed.filtered.append(file.name)
