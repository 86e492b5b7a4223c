"""Data sets and options that cannot be trained with, told apart before anything is computed."""

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from lqf_lightning.data.option import check_option
from lqf_lightning.data.source import Samples
from lqf_lightning.data.stream import UNLABELED


def refuse_sizes(image_size: int, crop_fraction: float, batch_size: int, eval_batch_size: int) -> None:
    """Check the sizes of images and batches.

    Args:
        image_size: Side in pixels.
        crop_fraction: Share of the shorter side that evaluation keeps.
        batch_size: Samples per training step.
        eval_batch_size: Samples per evaluation step.
    """
    check_option("image_size", image_size, image_size >= 1, "at least 1", 224)
    check_option("crop_fraction", crop_fraction, 0 < crop_fraction <= 1, "above 0 and at most 1", 0.875)
    check_option("batch_size", batch_size, batch_size >= 1, "at least 1", 32)
    check_option("eval_batch_size", eval_batch_size, eval_batch_size >= 1, "null or at least 1", "null")


def refuse_workers(num_workers: int | None, cache_images: bool) -> None:
    """Check the number of worker processes.

    Args:
        num_workers: Worker processes per loader; None: chosen by the data module.
        cache_images: Whether images are kept in the main process.

    Raises:
        ValueError: The workers would not find the images.
    """
    check_option("num_workers", num_workers, num_workers is None or num_workers >= 0, "null or at least 0", "null")
    if cache_images and num_workers:
        raise ValueError(
            f"data.cache_images=true keeps images in the main process, but data.num_workers={num_workers} loads "
            "them in others; set data.num_workers=0"
        )


def refuse_unusable(splits: Mapping[str, Samples], emptied: Collection[int] = ()) -> None:
    """Check that the splits agree on classes that all have images and whose labels exist.

    Args:
        splits: Samples under train, and perhaps val, test and unlabeled.
        emptied: Positions of classes that may have no training images, because all were forgotten.

    Raises:
        ValueError: Something is wrong with the data set; the message names it.
    """
    if "train" not in splits:
        raise ValueError(f"the data set has no train split, only {sorted(splits)}")
    for name, samples in splits.items():
        if name == "unlabeled":
            _refuse_known_labels(samples)
            continue
        _refuse_labels(name, samples, emptied if name == "train" else ())
        _refuse_other_classes(name, splits["train"], samples)
    classes = splits["train"].classes
    if len(classes) < 2:
        raise ValueError(f"at least two classes are needed to train a classifier, the data set has {list(classes)}")
    repeated = sorted({name for name in classes if list(classes).count(name) > 1})
    if repeated:
        raise ValueError(f"several classes have the same name: {', '.join(repeated)}")


def refuse_unlearnable(
    classes: Sequence[str],
    labels: Iterable[int],
    true_labels: Iterable[int] = (),
    options: Mapping[str, Any] | None = None,
) -> None:
    """Check that the options leave labeled training images for every class.

    Args:
        classes: Names of the classes.
        labels: Class positions that the run is told of the training samples that are used with their labels.
        true_labels: Their true class positions, if known: a class that still has images has lost its labels only.
        options: The values of `label_noise`, `label_fraction`, `labels_per_class` and `subset`, if known.

    Raises:
        ValueError: A class has none left.
    """
    present = {int(label) for label in labels}
    gone = [position for position in range(len(classes)) if position not in present]
    if not gone:
        return
    mislabeled = set(map(int, true_labels)) & set(gone)
    advice = [_advice_on_labels(options or {})] if mislabeled else []
    if len(mislabeled) < len(gone):
        advice.append(_advice_on_images(options or {}))
    which = f"{len(gone)} of {len(classes)} classes: {_list([classes[position] for position in gone])}"
    lost = f" ({len(mislabeled)} of them have images, all of which were given wrong labels)" if mislabeled else ""
    raise ValueError(f"no training images are left with the label of {which}{lost}. {'. '.join(advice)}")


def refuse_other_contents(paths: Sequence[str]) -> None:
    """Check that the files of an earlier run are what they were.

    Args:
        paths: Those that are not.

    Raises:
        ValueError: There are any.
    """
    if len(paths):
        listed = ", ".join(list(paths)[:5]) + (", ..." if len(paths) > 5 else "")
        raise ValueError(
            f"{len(paths)} files are not what they were in the run that data.manifest describes: {listed}. Give "
            "changed images new names, or set data.manifest=null to number the samples afresh."
        )


def _advice_on_images(options: Mapping[str, Any]) -> str:
    if options.get("subset") is not None:
        return f"Add images of every class to data.subset={options['subset']}"
    return (
        "Set data.subset_ratio higher, data.val_fraction lower, or use data.shots, which chooses images of every class"
    )


def _advice_on_labels(options: Mapping[str, Any]) -> str:
    noise, fraction, count = (options.get(name) for name in ("label_noise", "label_fraction", "labels_per_class"))
    changes = [
        f"data.label_noise lower than {noise}" if noise else "data.manifest=null, whose run had wrong labels",
        *([f"data.labels_per_class higher than {count}, or null for all labels"] if count is not None else []),
        *([f"data.label_fraction higher than {fraction}"] if fraction is not None and fraction < 1 else []),
    ]
    return f"Set {', or '.join(changes)}"


def _refuse_labels(name: str, samples: Samples, emptied: Collection[int]) -> None:
    if not samples.paths:
        raise ValueError(f"split {name} has no images")
    labels, count = np.asarray(samples.labels), len(samples.classes)
    outside = np.flatnonzero((labels < 0) | (labels >= count))
    if len(outside):
        first = outside[0]
        raise ValueError(
            f"split {name}: {len(outside)} labels are outside 0..{count - 1} ({count} classes); the first is "
            f"{labels[first]} of {samples.paths[first]}"
        )
    empty = np.setdiff1d(np.setdiff1d(np.arange(count), list(emptied)), labels).astype(int)
    if len(empty):
        raise ValueError(
            f"split {name}: no images for {len(empty)} of {count} classes: "
            f"{_list([samples.classes[label] for label in empty])}. Add images, or remove them from every split"
        )


def _refuse_known_labels(samples: Samples) -> None:
    if not samples.paths:
        raise ValueError("split unlabeled has no images")
    known = np.flatnonzero(np.asarray(samples.labels) != UNLABELED)
    if len(known):
        raise ValueError(
            f"split unlabeled: {len(known)} images have a label; the first is {samples.labels[known[0]]} of "
            f"{samples.paths[known[0]]}. Every label of this split has to be {UNLABELED}"
        )


def _refuse_other_classes(name: str, train: Samples, samples: Samples) -> None:
    missing = [c for c in train.classes if c not in samples.classes]
    surplus = [c for c in samples.classes if c not in train.classes]
    if missing or surplus:
        raise ValueError(
            f"split {name} has other classes than split train: missing {_list(missing)}; only in {name} "
            f"{_list(surplus)}. All splits need the same class folders."
        )
    if list(samples.classes) != list(train.classes):
        raise ValueError(f"split {name} numbers its classes in another order than split train")


def _list(names: list[str]) -> str:
    return (", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")) or "none"
