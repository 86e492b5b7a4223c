"""All samples of a data set, found by path."""

from collections.abc import Iterator, Mapping

import pandas as pd

from lqf_lightning.data.dataset import Record
from lqf_lightning.data.images import Images
from lqf_lightning.data.source import Samples
from lqf_lightning.data.stream import UNLABELED


class Pool:
    """The samples of all splits, found by their path.

    Args:
        splits: Samples under train, and perhaps val, test and unlabeled.

    Attributes:
        classes: Names of the classes.
        places: The collection that holds each path, and the position there.

    Raises:
        ValueError: Two samples have the same path.
    """

    def __init__(self, splits: Mapping[str, Samples]) -> None:
        self.splits = {name: splits[name] for name in ("train", "val", "test", "unlabeled") if name in splits}
        self.classes = list(splits["train"].classes)
        self.places: dict[str, tuple[Images, int]] = {}
        for samples in self.splits.values():
            for position, path in enumerate(samples.paths):
                if path in self.places:
                    raise ValueError(f"two samples of the data set have the same path: {path}")
                self.places[path] = (samples.images, position)

    def rows(self) -> Iterator[tuple[str, str, int]]:
        """List all samples in order.

        Yields:
            Split, path and label.
        """
        for split, samples in self.splits.items():
            for path, label in zip(samples.paths, samples.labels, strict=True):
                yield split, path, int(label)

    def records(self, rows: pd.DataFrame, *, hidden: bool = False) -> list[Record]:
        """Find the images of some rows of a manifest.

        Args:
            rows: The rows.
            hidden: Whether to hide the labels of all of them, not only of those whose label is not to be used.

        Returns:
            A record per row, with the target -1 where the label is hidden.
        """
        labels = rows["label"].where(rows["labeled"] & (not hidden), UNLABELED)
        columns = zip(rows["path"], labels, rows["index"], strict=True)
        return [Record(*self.places[path], int(label), int(index)) for path, label, index in columns]

    def content(self, path: str) -> bytes:
        """Read the bytes that identify a sample.

        Args:
            path: Its path.

        Returns:
            The file, or the pixels of a sample in memory.
        """
        images, position = self.places[path]
        return images.content(position)
