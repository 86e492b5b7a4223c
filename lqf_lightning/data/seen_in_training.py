"""Images that earlier training has seen: those that are to be held out now, and those whose labels are known to it."""

from collections.abc import Set
from pathlib import Path

import torch
from torch import Tensor

from lqf_lightning.backbones.run_checkpoint import split_part
from lqf_lightning.backbones.told_slope import told_facts
from lqf_lightning.data.manifest import Manifest


def seen_in_training(manifest: Manifest, split: str, *others: Path) -> int:
    """Count the images of a split that models were trained on, by content, whatever their files are called.

    Args:
        manifest: The samples of this run; those without hash count as unseen.
        split: train, val or test.
        *others: Manifests of the runs that the models are of.

    Returns:
        Number of samples of the split that are among the used training samples of any of these runs, labeled or not.
    """
    seen: set[str] = set()
    for other in others:
        seen.update(Manifest.read(other).training_rows()["sha"])
    return int(manifest.rows(split)["sha"].isin(seen - {""}).sum())


def seen_labels(manifest: Manifest, contents: Set[str]) -> Tensor | None:
    """Mark the training images whose labels something has learned from, by content.

    Args:
        manifest: The samples of this run; images that have no hash yet get one, unless there is nothing to compare.
        contents: Hashes of the images that were learned from with their labels.

    Returns:
        True for those of the split train, used or not (len(manifest),), bool; None if there are none.
    """
    if not contents - {""}:
        return None
    manifest.hash_contents()
    table = manifest.table
    found = (table["split"] == "train") & ~table["removed"] & table["sha"].isin(contents - {""})
    return torch.from_numpy(found.to_numpy(copy=True)) if found.any() else None


def manifest_behind(weights: str | None) -> Path | None:
    """Find the list of the images that weights were trained on.

    Args:
        weights: A checkpoint of a run, ``RUN/checkpoints/NAME.ckpt`` with or without ``@PART``, what ``lqf-export``
            wrote into the run's folder, or any other value of ``backbone.weights``.

    Returns:
        ``RUN/manifest.parquet``, or None if there is none beside the weights, nor beside those that ``lqf-adapt`` has
        made them from.
    """
    path, _ = split_part(Path(weights or ""))
    folder = {".ckpt": path.parent.parent, ".safetensors": path.parent}.get(path.suffix)
    manifest = None if folder is None else folder / "manifest.parquet"
    if manifest is not None and manifest.is_file():
        return manifest
    adapted = told_facts(path).get("weights")
    return None if adapted is None else manifest_behind(adapted)
