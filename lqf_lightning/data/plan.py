"""Which samples a run trains on, and with which labels."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd

from lqf_lightning.data.core import Part, keep_part, mark_core, refuse_part
from lqf_lightning.data.label_noise import flip_labels
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.option import check_option
from lqf_lightning.data.pool import Pool
from lqf_lightning.data.refusals import refuse_unlearnable
from lqf_lightning.data.sample_file import read_subset
from lqf_lightning.data.selection import choose_count_per_class, choose_fraction_per_class, choose_lowest, draw_lots
from lqf_lightning.data.settled_choice import CHOICE, emptied_classes, settle_labels, settle_samples

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """The options that decide on samples and labels; each is decided sample by sample, by lot.

    Attributes:
        val_fraction: Share of every class held out for validation when the data set has no validation split.
        split_seed: Decides which.
        shots: Training samples per class, or None for all.
        subset_ratio: Share of the training samples; a smaller share is a subset of a larger one.
        subset_seed: Decides which, for both.
        label_noise: Share of the labeled training samples that get the label of another class.
        noise_seed: Decides which, and which label.
        label_fraction: Share of every class, at least one sample, whose labels are used; a smaller share is a subset of
            a larger one.
        labels_per_class: Training samples per class whose labels are used, or None for `label_fraction`.
        label_seed: Decides which, for both.
        subset: File that names the training samples, or None for `shots` and `subset_ratio`.
        core: Which training samples will never have to be forgotten, None: nothing is known of that.
        part: Train on the "core", on the others ("user"), or on "all"; the options above choose among these.
    """

    val_fraction: float
    split_seed: int
    shots: int | None
    subset_ratio: float
    subset_seed: int
    label_noise: float
    noise_seed: int
    label_fraction: float
    labels_per_class: int | None
    label_seed: int
    subset: str | Path | None = None
    core: Any = None
    part: Part = "all"

    def __post_init__(self) -> None:
        """Check the ranges.

        Raises:
            ValueError: An option is outside its range, or two contradict each other.
        """
        check_option("val_fraction", self.val_fraction, 0 <= self.val_fraction < 1, "at least 0 and below 1", "0.1")
        check_option("label_noise", self.label_noise, 0 <= self.label_noise < 1, "at least 0 and below 1", "0.2")
        check_option("subset_ratio", self.subset_ratio, 0 < self.subset_ratio <= 1, "above 0 and at most 1", "0.5")
        check_option("label_fraction", self.label_fraction, 0 < self.label_fraction <= 1, "above 0, at most 1", "0.1")
        refuse_part(self.core, self.part)
        for name, count in (("shots", self.shots), ("labels_per_class", self.labels_per_class)):
            check_option(name, count, count is None or count >= 1, "null or at least 1", "null")
        if self.shots is not None and self.subset_ratio < 1:
            raise ValueError(
                f"data.shots={self.shots} and data.subset_ratio={self.subset_ratio} both choose training images; "
                "set data.shots=null or data.subset_ratio=1"
            )
        if self.subset is not None and (self.shots is not None or self.subset_ratio < 1):
            raise ValueError(
                f"data.subset={self.subset} chooses training images, and so do data.shots={self.shots} and "
                f"data.subset_ratio={self.subset_ratio}; set data.subset=null, or data.shots=null and "
                "data.subset_ratio=1"
            )
        if self.labels_per_class is not None and self.label_fraction < 1:
            raise ValueError(
                f"data.labels_per_class={self.labels_per_class} and data.label_fraction={self.label_fraction} both "
                "choose labels; set data.labels_per_class=null or data.label_fraction=1"
            )

    def apply(self, pool: Pool, previous: Manifest | None) -> Manifest:
        """Number the samples, hold out, choose and relabel.

        Args:
            pool: The samples of all splits.
            previous: Manifest of an earlier run whose samples keep index, split and label.

        Returns:
            The manifest of the run.
        """
        manifest = Manifest.build(pool.rows(), pool.classes, pool.content)
        if "val" not in pool.splits and self.val_fraction:
            train = manifest.rows("train")
            lots = draw_lots(train["path"], self.split_seed, "val")
            held_out = choose_fraction_per_class(lots, train["label"].tolist(), self.val_fraction)
            manifest.table.loc[train.index[held_out], "split"] = "val"
        if previous is not None:
            manifest = manifest.align(previous)
        mark_core(manifest, self.core, previous)
        absent = [*keep_part(manifest, self.part), *emptied_classes(previous)]
        manifest.choice = {name: getattr(self, name) for name in CHOICE}
        if self.subset is not None or not settle_samples(manifest, previous):
            self._choose(manifest, absent)
        if not settle_labels(manifest, previous):
            self._choose_labels(manifest, absent)
        self._relabel(manifest, previous)
        self._refuse_unlearnable(manifest, absent)
        return manifest

    def _choose(self, manifest: Manifest, absent: Sequence[int]) -> None:
        train = manifest.rows("train")
        lots = draw_lots(train["path"], self.subset_seed, "subset")
        if self.subset is not None:
            wanted = read_subset(self.subset, manifest)
            chosen = np.flatnonzero(train["index"].isin(wanted))
            if len(chosen) < len(wanted):
                where = "gone" if self.part == "all" else f"gone, or no part of data.part={self.part}"
                log.warning("%d images of data.subset=%s are %s", len(wanted) - len(chosen), self.subset, where)
        elif self.shots is not None:
            labels = train["true_label"].tolist()
            chosen = choose_count_per_class(lots, labels, self.shots, manifest.classes, absent=absent)
        else:
            chosen = choose_lowest(lots, max(1, round(self.subset_ratio * len(train))))
        manifest.table.loc[np.delete(train.index.to_numpy(), chosen), "used"] = False

    def _choose_labels(self, manifest: Manifest, absent: Sequence[int]) -> None:
        train = manifest.rows("train")
        if self.labels_per_class is None and self.label_fraction == 1:
            return
        lots = draw_lots(train["path"], self.label_seed, "label")
        labels, count = train["true_label"].tolist(), self.labels_per_class
        if count is not None:
            chosen = choose_count_per_class(lots, labels, count, manifest.classes, "labels_per_class", absent)
        else:
            chosen = choose_fraction_per_class(lots, labels, self.label_fraction, leave=0)
        manifest.table.loc[np.delete(train.index.to_numpy(), chosen), "labeled"] = False

    def _relabel(self, manifest: Manifest, previous: Manifest | None) -> None:
        train = manifest.rows("train")
        if previous is not None:
            train = train[~train["index"].isin(_settled(previous))]
        paths, labels = train["path"].tolist(), train["true_label"].tolist()
        given: npt.NDArray[np.int64] = flip_labels(
            paths, labels, len(manifest.classes), self.label_noise, self.noise_seed
        )
        manifest.table.loc[train.index, "label"] = given
        manifest.table.loc[train.index, "class"] = [manifest.classes[label] for label in given]

    def _refuse_unlearnable(self, manifest: Manifest, absent: Sequence[int]) -> None:
        train = manifest.rows("train")
        names = ("label_noise", "label_fraction", "labels_per_class", "subset")
        options = {name: getattr(self, name) for name in names}
        refuse_unlearnable(manifest.classes, [*train["label"], *absent], train["true_label"], options)


def _settled(previous: Manifest) -> "pd.Series[int]":
    # Samples whose label the earlier run was told, so that whether it is wrong has been decided: later runs agree with
    # it. Of files that were gone nothing says whether a run before that was told; they keep the label that they had.
    table = previous.table
    return table.loc[(table["used"] & table["labeled"]) | table["removed"], "index"]
