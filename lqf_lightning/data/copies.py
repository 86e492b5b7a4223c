"""Augmentation as extra samples: training images several times over, under draws that never change."""

from collections.abc import Callable, Sequence
from typing import Any

from torch.utils.data import Dataset

from lqf_lightning.data.dataset import ImageDataset, Sample
from lqf_lightning.data.option import check_option


class CopiedDataset(Dataset[Sample]):
    """Images as they are evaluated, followed by copies of all of them, copy by copy, each under its own draws.

    Position ``i + c * len(images)`` is copy c of image i, c = 0 the image itself. Its index is that of the image plus
    c times the length of the manifest: still unique, ascending if those of the images are, and the image is known from
    it (`ListedSamples.image_of`).

    Args:
        images: The images as they are evaluated.
        drawn: The same images per copy, in the same order, transformed by draws that depend on image and copy alone.
        rows: Length N of the manifest.
    """

    def __init__(self, images: ImageDataset, drawn: Sequence[ImageDataset], rows: int) -> None:
        self.copies = [images, *drawn]
        self.rows = rows

    def __len__(self) -> int:
        """Count the samples.

        Returns:
            Images times copies.
        """
        return len(self.copies) * len(self.copies[0])

    def __getitem__(self, position: int) -> Sample:
        """Load, transform and normalize one sample.

        Args:
            position: Its place.

        Returns:
            Image, target and index.
        """
        copy, image = divmod(position, len(self.copies[0]))
        pixels, target, index = self.copies[copy][image]
        return pixels, target, index + copy * self.rows


FixedDataset = ImageDataset | CopiedDataset


def checked_copies(copies: Any, training_transform: Callable[..., Any]) -> int:
    """Check that there is at least one sample per image, and that copies differ.

    Args:
        copies: Samples per training image.
        training_transform: Transform of training images.

    Returns:
        Samples per training image.

    Raises:
        ValueError: The copies would all be equal.
    """
    whole = isinstance(copies, int) and not isinstance(copies, bool)
    check_option("copies", copies, whole and copies >= 1, "a whole number of at least 1", 1)
    if copies > 1 and not getattr(training_transform, "random", True):
        raise ValueError(
            f"data.copies={copies} adds training images under draws of data.augmentation, but "
            f"{type(training_transform).__name__} draws nothing, so that all copies would be equal. Set "
            "data/augmentation=crop_flip (or shift, crop, randaugment), or data.copies=1"
        )
    return int(copies)


def refuse_ordinary_batches(copies: int, sweeps: int) -> None:
    """Check that a method with copies of training images sweeps over fixed samples.

    Args:
        copies: Samples per training image.
        sweeps: How often an epoch of the method goes through fixed samples; 0: it takes ordinary training batches.

    Raises:
        ValueError: It does not: its batches are augmented afresh in every epoch.
    """
    if copies > 1 and not sweeps:
        raise ValueError(
            f"data.copies={copies} is for solvers that sweep over fixed samples, but this method takes ordinary "
            "training batches, for which data.augmentation is drawn afresh in every epoch. Set data.copies=1, or "
            "method=lqf with method.solver=cg or method.solver=kernel"
        )


def refuse_copies(data: Any, what: str) -> None:
    """Check that every training image is one sample, for what tells training images apart.

    Args:
        data: The data module; one without `copies` has none.
        what: What cannot be done with them, as the subject of a sentence in the plural: "scores per sample".

    Raises:
        ValueError: There are copies.
    """
    if (copies := getattr(data, "copies", 1)) > 1:
        raise ValueError(
            f"{what} are made for one sample per training image, but data.copies={copies} trains on {copies} of each. "
            "Set data.copies=1 and train so, or leave them out"
        )
