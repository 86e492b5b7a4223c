"""Answers that a model gave earlier, in a file."""

import json
import tempfile
from collections.abc import Sequence
from hashlib import blake2b
from pathlib import Path
from typing import Self

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from lqf_lightning.teachers.prediction_table import checked_predictions, stacked_logits


class StoredPredictions:
    """What a model predicted for the samples of a manifest: a model in use, known by its answers alone.

    The file is a Parquet table with a row per sample: `index` (row of the manifest) and `prediction` (class name); as
    far as they are known also `confidence` (probability of the prediction), `logits` (one number per class) and `sha`
    (content hash of the image, checked where it is there). The class names, in the order of the logits, are JSON in the
    metadata under ``classes``; without it there are no logits, and the model knows the classes of the data and those
    that it predicts.

    Args:
        table: The rows.
        classes: Class names, in the order of the logits.
        name: What to call the model.

    Attributes:
        fingerprint: Hash of the answers.

    Raises:
        ValueError: A column is missing or has unusable values, an index repeats, a prediction is no class, or logits
            have another length or another best class than the prediction.
    """

    def __init__(self, table: pd.DataFrame, classes: Sequence[str], name: str) -> None:
        self.classes, self.name = list(classes), name
        self.table = checked_predictions(table, self.classes, name).sort_values("index").reset_index(drop=True)
        place = {label: position for position, label in enumerate(self.classes)}
        self._index = torch.from_numpy(self.table["index"].to_numpy(np.int64).copy())
        self._position = torch.tensor([place[label] for label in self.table["prediction"]], dtype=torch.int64)
        self._logits = stacked_logits(self.table, self.classes, name) if "logits" in self.table else None
        digest = blake2b(
            json.dumps([self.classes, self._index.tolist(), self._position.tolist()]).encode(), digest_size=16
        )
        if self._logits is not None:
            digest.update(self._logits.numpy().tobytes())
        self.fingerprint = digest.hexdigest()

    @property
    def has_logits(self) -> bool:
        """Whether all outputs are known, not only the best."""
        return self._logits is not None

    @property
    def has_confidence(self) -> bool:
        """Whether the probabilities of the predictions are known."""
        return self.has_logits or "confidence" in self.table

    def look_up(self, index: Tensor) -> Tensor:
        """Find the outputs of samples.

        Args:
            index: Rows of the manifest (B,).

        Returns:
            Outputs (B, C), on the device of `index`.

        Raises:
            ValueError: The file holds none, or not those of all the samples.
        """
        if self._logits is None:
            raise ValueError(f"{self.name} has no column `logits`, which is needed here. Set reference to a model")
        return self._logits[self._rows(index)].to(index.device)

    def predictions(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """Find the predictions of samples.

        Args:
            index: Rows of the manifest (B,).

        Returns:
            Class positions (B,), and their probabilities (B,), NaN where they are not known.
        """
        rows = self._rows(index)
        if self._logits is not None:
            confidence = self._logits[rows].softmax(-1).amax(-1)
        elif "confidence" in self.table:
            confidence = torch.tensor(self.table["confidence"].to_numpy(np.float32)[rows.numpy()])
        else:
            confidence = torch.full((len(rows),), torch.nan)
        return self._position[rows].to(index.device), confidence.to(index.device)

    def check(self, index: Sequence[int], sha: Sequence[str], split: str) -> None:
        """Make sure that samples are in the file, and are still what they were.

        Args:
            index: Rows of the manifest.
            sha: Content hashes of these samples; empty ones are not compared.
            split: What to call them.

        Raises:
            ValueError: Some are missing or have changed.
        """
        rows = self._rows(torch.tensor(list(index), dtype=torch.int64), split)
        if "sha" not in self.table:
            return
        known = self.table["sha"].to_numpy()[rows.numpy()]
        changed = [i for i, now, then in zip(index, sha, known, strict=True) if now and then and now != then]
        if changed:
            raise ValueError(
                f"{self.name} was written for other images: {len(changed)} of {len(rows)} {split} samples have "
                f"changed, the first is index {changed[0]}. Set data.manifest to that of its run, or write it afresh"
            )

    def _rows(self, index: Tensor, split: str = "") -> Tensor:
        wanted = index.cpu()
        rows = torch.searchsorted(self._index, wanted).clamp(max=max(len(self._index) - 1, 0))
        absent = self._index[rows] != wanted if len(self._index) else torch.ones_like(wanted, dtype=torch.bool)
        if bool(absent.any()):
            raise ValueError(
                f"{self.name} has no prediction for {int(absent.sum())} of {len(wanted)} {split} samples, the first is "
                f"index {int(wanted[absent][0])}. Set reference to a file that covers them, or to the model itself"
            )
        return rows

    def write(self, path: str | Path) -> None:
        """Write the file, never seen half-written, whoever else writes it too.

        Args:
            path: Where to write.
        """
        table = pa.Table.from_pandas(self.table, preserve_index=False)
        metadata = {**(table.schema.metadata or {}), b"classes": json.dumps(self.classes).encode()}
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=path.parent) as own:  # nobody else writes there
            partial = Path(own) / path.name
            pq.write_table(table.replace_schema_metadata(metadata), partial)
            partial.replace(path)

    @classmethod
    def read(cls, path: str | Path, classes: Sequence[str] = ()) -> Self:
        """Read a file.

        Args:
            path: The file.
            classes: Class names of the data, which count where the file has none of its own.

        Returns:
            Its predictions, named after the file.

        Raises:
            FileNotFoundError: There is no such file.
            ValueError: It is no Parquet file, or has logits but no class names.
        """
        if not Path(path).is_file():
            raise FileNotFoundError(f"no predictions at {path}. Set reference to a Parquet file of predictions")
        try:
            table = pq.read_table(path)
        except pa.ArrowInvalid as error:
            raise ValueError(f"{path} is no Parquet file ({error}). Set reference to one, or to a model") from error
        frame, stored = table.to_pandas(), (table.schema.metadata or {}).get(b"classes")
        if stored is not None:
            return cls(frame, json.loads(stored), str(path))
        if "logits" in frame:
            raise ValueError(
                f"{path} has logits, but its metadata has no `classes` that say what they are of. Write it by "
                "StoredPredictions(table, classes, name).write(path), or leave the logits out"
            )
        predicted = set(frame["prediction"].dropna().astype(str)) if "prediction" in frame else set()
        return cls(frame, [*classes, *sorted(predicted - set(classes))], str(path))
