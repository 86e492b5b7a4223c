"""The table that says which sample every index stands for."""

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from hashlib import blake2b
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from torch import Tensor

from lqf_lightning.data.refusals import refuse_other_contents
from lqf_lightning.data.table_file import replace_table
from lqf_lightning.data.tombstone import bury, is_tombstone, tombstone_key, without_buried
from lqf_lightning.progress import track

_COLUMNS = {
    "index": "int64",
    "split": "str",
    "path": "str",
    "label": "int64",
    "class": "str",
    "true_label": "int64",
    "sha": "str",
    "used": "bool",
    "removed": "bool",
    "labeled": "bool",
    "core": "str",
}
_LATER: dict[str, bool | str] = {"labeled": True, "core": ""}  # what files from before these columns mean


class Manifest:
    """One row per sample; the row number is the sample's index, in every split and for good.

    Columns: `index`; `split` (train, val, test, or unlabeled: training samples of no known class); `path` (relative
    path or position); `label` and `class` (what the run is told; -1 and empty where unknown); `true_label` (differs
    under label noise); `sha` (BLAKE2b of the file, or of the pixels in memory); `used` (false for training samples left
    out by `shots`, `subset_ratio` or `subset`); `removed` (a file of an earlier run that is gone, or a sample that was
    forgotten on request: its index is never given to another one); `labeled` (false for training samples whose label is
    unknown, or hidden from the run by `label_fraction` or `labels_per_class`); `core` (for training samples that will
    never have to be forgotten, the choice of `data.core` that said so; empty for all others).

    Args:
        table: The rows, in order of index.
        classes: Names of the classes.
        content: Reads the bytes of the sample with a given path; needed while hashes are missing.
        key: By which the files of forgotten samples are known again, in hexadecimal; empty: nothing was forgotten.
        choice: The options of the data that chose samples and labels by lot; None: unknown.
    """

    def __init__(
        self,
        table: pd.DataFrame,
        classes: Sequence[str],
        content: Callable[[str], bytes] | None = None,
        key: str = "",
        choice: Mapping[str, Any] | None = None,
    ) -> None:
        self.table = table.astype(_COLUMNS)[list(_COLUMNS)].reset_index(drop=True)
        self.classes = list(classes)
        self.content, self.key = content, key
        self.choice = None if choice is None else dict(choice)

    @classmethod
    def build(
        cls, rows: Iterable[tuple[str, str, int]], classes: Sequence[str], content: Callable[[str], bytes] | None = None
    ) -> Self:
        """Number the samples of a new run.

        Args:
            rows: Split, path and label of every sample; the label -1 where it is unknown.
            classes: Names of the classes.
            content: Reads the bytes of the sample with a given path.

        Returns:
            A manifest without hashes in which all samples are used and all known labels too.
        """
        table = pd.DataFrame(list(rows), columns=["split", "path", "label"])
        table["index"] = np.arange(len(table))
        table["true_label"] = table["label"]
        table["labeled"] = table["label"] >= 0
        table["class"] = [classes[label] if label >= 0 else "" for label in table["label"]]
        return cls(table.assign(sha="", used=True, removed=False, core=""), classes, content)

    def __len__(self) -> int:
        """Count the rows, removed ones included.

        Returns:
            The number that is one above the highest index.
        """
        return len(self.table)

    def rows(self, split: str) -> pd.DataFrame:
        """Look up the samples of a split that take part in the run with their labels.

        Args:
            split: train, val or test.

        Returns:
            Used, labeled, not removed rows in order of index.
        """
        table = self.table
        return table[(table["split"] == split) & table["used"] & ~table["removed"] & table["labeled"]]

    def labeled_rows(self) -> pd.DataFrame:
        """Look up all training samples whose label the run may know, whether it trains on them or not.

        Returns:
            Labeled, not removed rows of the split train, in order of index.
        """
        table = self.table
        return table[(table["split"] == "train") & ~table["removed"] & table["labeled"]]

    def training_rows(self) -> pd.DataFrame:
        """Look up all samples that a run may learn from, with or without a label.

        Returns:
            Used, not removed rows of the splits train and unlabeled, in order of index.
        """
        table = self.table
        return table[table["split"].isin(["train", "unlabeled"]) & table["used"] & ~table["removed"]]

    @property
    def forgotten(self) -> npt.NDArray[np.bool_]:
        """Which rows are those of samples that were forgotten on request (len(self),)."""
        return is_tombstone(self.table["path"])

    def forget(self, indices: Tensor | npt.NDArray[np.int64]) -> "Manifest":
        """Replace samples by tombstones: rows that are `removed` and say neither path, label nor content.

        Args:
            indices: Of the samples (K,); tombstones stay what they are.

        Returns:
            A new manifest. Files that are still there are known again by `align` and get no new index.

        Raises:
            IndexError: An index belongs to no row.
        """
        rows = np.unique(np.asarray(indices, dtype=np.int64))
        if len(rows) and not 0 <= rows[0] <= rows[-1] < len(self):
            raise IndexError(f"got indices from {rows[0]} to {rows[-1]}, expected 0 to {len(self) - 1}")
        key = self.key or tombstone_key(self.table["path"])
        return Manifest(bury(self.table, rows, key), self.classes, self.content, key, self.choice)

    def hash_contents(self) -> None:
        """Fill in missing hashes, reading every file once; removed samples keep the hash they had.

        Raises:
            RuntimeError: Hashes are missing and the manifest does not know how to read the samples.
        """
        missing = (self.table["sha"] == "") & ~self.table["removed"]
        paths = self.table.loc[missing, "path"].tolist()
        if not paths:
            return
        if (content := self.content) is None:
            raise RuntimeError("a manifest read from a file cannot hash images")
        with ThreadPoolExecutor() as pool:
            hashes = pool.map(lambda path: blake2b(content(path), digest_size=20).hexdigest(), paths)
            progress = track(hashes, "Hashing images", len(paths))
            self.table.loc[missing, "sha"] = list(progress)

    def align(self, previous: "Manifest") -> "Manifest":
        """Number the samples as an earlier run did.

        Samples known from that run keep index, split, label (so noisy labels stay what they were) and `core`; samples
        that are gone stay as removed rows; new samples follow at the end, none of them core. `used` and `labeled` are
        taken from this manifest.

        Args:
            previous: Manifest of the earlier run.

        Returns:
            The aligned manifest.

        Raises:
            ValueError: The classes have changed.
        """
        if previous.classes != self.classes:
            raise ValueError(
                f"the classes have changed: data.manifest lists {previous.classes}, the data set has {self.classes}. "
                "Restore the class folders, or set data.manifest=null to number the samples afresh."
            )
        self.hash_contents()
        now = without_buried(self.table, previous.table, previous.key).set_index("path")
        then = previous.table.set_index("path")
        known = then.index.intersection(now.index, sort=False)
        refuse_other_contents(known[(then.loc[known, "sha"] != now.loc[known, "sha"]).to_numpy()])
        old = then.assign(removed=~then.index.isin(now.index))
        for column in ("used", "labeled"):
            old[column] = now[column].reindex(old.index, fill_value=False).astype(bool)
        new = now[~now.index.isin(then.index)]
        table = pd.concat([old, new]).reset_index()
        return Manifest(table.assign(index=np.arange(len(table))), self.classes, self.content, previous.key)

    def write(self, path: str | Path) -> None:
        """Hash what is not hashed yet and write the table as Parquet.

        Args:
            path: Where to write.
        """
        self.hash_contents()
        table = pa.Table.from_pandas(self.table, preserve_index=False)
        notes = {"classes": self.classes, "tombstone_key": self.key, "choice": self.choice}
        known = {name.encode(): json.dumps(value).encode() for name, value in notes.items()}
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        replace_table(table.replace_schema_metadata({**table.schema.metadata, **known}), Path(path))

    @classmethod
    def read(cls, path: str | Path) -> Self:
        """Read what `write` wrote.

        Args:
            path: Where it was written.

        Returns:
            The manifest, without access to the images.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: The file is not a manifest.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no manifest at {path}; set data.manifest=... to the manifest of an earlier run")
        table = pq.read_table(path)
        metadata = table.schema.metadata or {}
        if b"classes" not in metadata or set(table.column_names) | set(_LATER) != set(_COLUMNS):
            raise ValueError(f"{path} is not a manifest: it has the columns {table.column_names}")
        rows = table.to_pandas()
        for column, value in _LATER.items():
            rows[column] = rows.get(column, value)
        key, choice = (json.loads(metadata.get(name, b"null")) for name in (b"tombstone_key", b"choice"))
        return cls(rows, json.loads(metadata[b"classes"]), None, key or "", choice)
