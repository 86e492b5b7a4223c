"""What the run that starting weights come from was trained on."""

import logging
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only

from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.seen_in_training import manifest_behind, seen_in_training

log = logging.getLogger(__name__)


@rank_zero_only
def warn_of_seen_images(weights: str | None, data: ImageDataModule) -> None:
    """Say how many of the images that are held out now the run was trained on that the weights come from.

    Args:
        weights: The option ``backbone.weights``; only files of a run folder tell where they come from.
        data: The data module, set up; images that have no hash yet get one.
    """
    manifest = manifest_behind(weights)
    if manifest is None:
        return
    data.manifest.hash_contents()
    seen = {split: seen_in_training(data.manifest, split, manifest) for split in ("val", "test")}
    if not any(seen.values()):
        return
    counts = " and ".join(
        f"{number} of the {len(data.manifest.rows(split))} {split} images" for split, number in seen.items() if number
    )
    log.warning(
        "backbone.weights=%s comes from a run that was trained on %s: accuracy there flatters this network. %s",
        weights, counts, _advice(manifest),
    )  # fmt: skip


def _advice(manifest: Path) -> str:
    if not len(Manifest.read(manifest).rows("val")):
        return (
            "That run held no images out, so no split of them is new to it: train it again with data.val_fraction=0.1, "
            "or validate and test on other images"
        )
    return (
        f"Set data.manifest={manifest}, or the same data.split_seed and data.val_fraction as that run had, to hold out "
        "the same images; what remains then are copies of training images"
    )
