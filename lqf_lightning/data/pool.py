"""All samples of a data set, found by path."""

from collections.abc import Iterator, Mapping

from lqf_lightning.data.images import Images
from lqf_lightning.data.source import Samples


class Pool:
    """The samples of all splits, found by their path.

    Args:
        splits: Samples under train, and perhaps val and test.

    Attributes:
        classes: Names of the classes.
        places: The collection that holds each path, and the position there.

    Raises:
        ValueError: Two samples have the same path.
    """

    def __init__(self, splits: Mapping[str, Samples]) -> None:
        self.splits = {name: splits[name] for name in ("train", "val", "test") if name in splits}
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

    def content(self, path: str) -> bytes:
        """Read the bytes that identify a sample.

        Args:
            path: Its path.

        Returns:
            The file, or the pixels of a sample in memory.
        """
        images, position = self.places[path]
        return images.content(position)
