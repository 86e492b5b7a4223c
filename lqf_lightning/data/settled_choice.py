"""Samples and labels that a run goes on with after some were forgotten: nobody takes their place."""

from collections.abc import Mapping

import numpy as np

from lqf_lightning.data.manifest import Manifest

_SAMPLES = {"shots": None, "subset_ratio": 1.0, "subset_seed": 0, "part": "all"}
_LABELS = {"label_fraction": 1.0, "labels_per_class": None, "label_seed": 0}
CHOICE = (*_SAMPLES, *_LABELS)  # options that choose samples and labels


def settle_samples(manifest: Manifest, previous: Manifest | None) -> bool:
    """Use the samples that an earlier run used, where that run forgot some and the options are still its own.

    Choosing afresh would draw others in the place of those that are gone. Samples that the earlier run did not know are
    used where everything is.

    Args:
        manifest: Aligned with the earlier one; `used` is changed in place.
        previous: Of the earlier run.

    Returns:
        Whether the choice stands, so that there is nothing left to choose.
    """
    if previous is None or not _stands(manifest, previous, tuple(_SAMPLES)):
        return False
    _take_over(manifest, previous, "used", everything=_chooses_all(manifest, ("shots", "subset_ratio"), _SAMPLES))
    return True


def settle_labels(manifest: Manifest, previous: Manifest | None) -> bool:
    """Use the labels that an earlier run used, where that run forgot some and samples and options are still its own.

    Args:
        manifest: Aligned with the earlier one, its samples chosen; `labeled` is changed in place.
        previous: Of the earlier run.

    Returns:
        Whether the choice stands.
    """
    if previous is None or not _stands(manifest, previous, tuple(_LABELS)):
        return False
    there = ~manifest.table["removed"].to_numpy()[: len(previous)]
    was, now = (table["used"].to_numpy()[: len(previous)] for table in (previous.table, manifest.table))
    if not np.array_equal(was[there], now[there]):
        return False
    every = _chooses_all(manifest, ("label_fraction", "labels_per_class"), _LABELS)
    _take_over(manifest, previous, "labeled", everything=every)
    return True


def emptied_classes(previous: Manifest | None) -> list[int]:
    """The classes of which every training sample was forgotten; only those may be without any.

    Args:
        previous: Manifest of an earlier run.

    Returns:
        Their positions; none where that run forgot nothing.
    """
    if previous is None or not previous.forgotten.any():
        return []
    return sorted(set(range(len(previous.classes))) - set(previous.rows("train")["true_label"]))


def _stands(manifest: Manifest, previous: Manifest, options: tuple[str, ...]) -> bool:
    if not previous.forgotten.any():
        return False
    then, now = previous.choice, manifest.choice or {}
    # Manifests of earlier versions do not say how they chose; who forgets from such a run has its options.
    return then is None or all(then.get(name) == now.get(name) for name in options)


def _chooses_all(manifest: Manifest, names: tuple[str, ...], neutral: Mapping[str, object]) -> bool:
    return all((manifest.choice or neutral).get(name) == neutral[name] for name in names)


def _take_over(manifest: Manifest, previous: Manifest, column: str, *, everything: bool) -> None:
    table, known = manifest.table, len(previous)
    train = (table["split"] == "train").to_numpy()
    then = previous.table[column].to_numpy() & ~table["removed"].to_numpy()[:known]
    values = table[column].to_numpy(copy=True)
    values[:known][train[:known]] = then[train[:known]]
    values[known:][train[known:]] &= everything
    table[column] = values
