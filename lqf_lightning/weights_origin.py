"""What the runs that starting weights come from were trained on."""

import logging
from pathlib import Path

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import OmegaConf

from lqf_lightning.backbones.told_slope import told_facts
from lqf_lightning.data import ImageDataModule, Manifest
from lqf_lightning.data.seen_in_training import manifest_behind, seen_in_training, seen_labels
from lqf_lightning.fitted_head import FILE, FittedHead

log = logging.getLogger(__name__)
_WITHOUT_LABELS = {f"lqf_lightning.methods.{name}" for name in ("BYOL", "MoCo")}


def note_seen_labels(weights: str | None, head: frozenset[str], data: ImageDataModule) -> None:
    """Tell the data which training images the starting weights have learned from with their labels, and say so.

    Args:
        weights: The option ``backbone.weights``; only files of a run folder tell where they come from.
        head: Hashes of the images that the head was fitted to.
        data: The data module, set up; `seen_by_weights` is set.
    """
    behind = contents_behind(weights)
    if not behind and "classes" in told_facts(weights):
        rank_zero_only(log.warning)(
            "backbone.weights=%s was trained with labels, but the run that did it is not beside it: whether these "
            "training images are among them is unknown, and what rests on leaving them out may be wrong. Keep the file "
            "in the folder of its run, beside manifest.parquet",
            weights,
        )
    data.seen_by_weights = seen_labels(data.manifest, behind | head)
    if data.seen_by_weights is None:
        return
    used = data.manifest.rows("train")["index"].to_numpy(copy=True)
    seen = int(data.seen_by_weights[used].sum())
    if seen:
        rank_zero_only(log.warning)(
            "the starting weights%s were trained on %d of the %d training images with their labels: what rests on "
            "leaving these out (a ridge by leave-one-out, unique information, forgetting) leaves them out, or is "
            "refused. Set data.core={fraction:0.5,seed:0} data.part=user to train on others than the head was fitted "
            "to, or start from weights that have not seen them",
            " and the head" if head else "", seen, len(used),
        )  # fmt: skip


def contents_behind(weights: str | None, known: frozenset[Path] = frozenset()) -> frozenset[str]:
    """Find the images whose labels went into weights, as far as run folders tell: also through the run before that.

    Args:
        weights: The option ``backbone.weights``.
        known: Manifests that have been looked at.

    Returns:
        Hashes of their contents; those of runs that use no labels (BYOL, MoCo) are not among them.
    """
    manifest = manifest_behind(weights)
    if manifest is None or manifest in known:
        return frozenset()
    written, head = manifest.parent / "config.yaml", manifest.parent / FILE
    config = OmegaConf.load(written) if written.is_file() else OmegaConf.create()
    earlier = contents_behind(OmegaConf.select(config, "backbone.weights"), known | {manifest})
    if head.is_file():
        earlier |= FittedHead.read(head).contents
    if OmegaConf.select(config, "method._target_") in _WITHOUT_LABELS:
        return earlier
    return earlier | frozenset(Manifest.read(manifest).rows("train")["sha"])


def refuse_slope_of_run(weights: str | None, slope: float | None) -> None:
    """Check that a checkpoint of a run is used with the leaky activations that it was trained with.

    Args:
        weights: The option ``backbone.weights``; files of weights tell their slope themselves.
        slope: The option ``backbone.leaky_slope``.

    Raises:
        ValueError: The run had another slope.
    """
    manifest = manifest_behind(weights)
    if manifest is None or not (written := manifest.parent / "config.yaml").is_file() or told_facts(weights):
        return
    trained = OmegaConf.select(OmegaConf.load(written), "backbone.leaky_slope")
    if trained is not None and trained != slope:
        raise ValueError(
            f"backbone.weights={weights} comes from a run with leaky activations of slope {trained}, got "
            f"backbone.leaky_slope={'null' if slope is None else slope}: with it they compute another function. Set "
            f"backbone.leaky_slope={trained}"
        )


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
