"""Samples as tensors, keyed so that chance depends on the sample and the epoch alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from torchvision.transforms import v2

from lqf_lightning.data.batch import Batch
from lqf_lightning.data.images import Images
from lqf_lightning.data.seeding import mix_seed, seeded


class CorruptImageError(RuntimeError):
    """An image that cannot be decoded."""


@dataclass(frozen=True, slots=True)
class Record:
    """Where to find one sample, and what is known of it.

    Attributes:
        images: The collection that holds the pixels.
        position: Place in that collection.
        target: Position of the class.
        index: Row of the manifest.
    """

    images: Images
    position: int
    target: int
    index: int


class ImageDataset(Dataset[tuple[Tensor, int, int]]):
    """Samples of one split; an item is (image (3, H, W), target, index).

    A plain position as key gives the sample with transforms seeded for epoch 0; a key (epoch, position) for that epoch.
    What is drawn depends on (seed, epoch, index) alone: not on the number of processes or workers, nor on what was
    loaded before.

    Args:
        records: The samples.
        transform: Maps an RGB image to a square image of fixed size.
        normalization: Mean and standard deviation per channel, for pixels in [0, 1].
        seed: Seed of the run.
        cache: Keep the transformed images in memory; for transforms without randomness.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: Callable[[Image.Image], Image.Image],
        normalization: tuple[Sequence[float], Sequence[float]],
        seed: int = 0,
        *,
        cache: bool = False,
    ) -> None:
        self.records = records
        self.transform = transform
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
        self.seed = seed
        self.cache: dict[int, Tensor] | None = {} if cache else None

    def __len__(self) -> int:
        """Count the samples.

        Returns:
            N.
        """
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, int]) -> tuple[Tensor, int, int]:
        """Load, transform and normalize one sample.

        Args:
            key: Position, or (epoch, position).

        Returns:
            Image, target and index.
        """
        epoch, position = key if isinstance(key, tuple) else (0, key)
        record = self.records[position]
        image = (self._pixels(record, epoch).float() / 255 - self.mean) / self.std
        return image, record.target, record.index

    def _pixels(self, record: Record, epoch: int) -> Tensor:
        if self.cache is not None and record.index in self.cache:
            return self.cache[record.index]
        image = _decode(record)
        with seeded(mix_seed(self.seed, epoch, record.index)):
            pixels: Tensor = v2.functional.pil_to_tensor(self.transform(image))
        if self.cache is not None:
            self.cache[record.index] = pixels
        return pixels


class Collate:
    """Stack samples into a batch; a batch may have no rows.

    Args:
        size: Side of the images in pixels.
    """

    def __init__(self, size: int) -> None:
        self.size = size

    def __call__(self, samples: list[tuple[Tensor, int, int]]) -> Batch:
        """Stack.

        Args:
            samples: Items of an `ImageDataset`.

        Returns:
            The batch.
        """
        images = [image for image, _, _ in samples]
        stacked = torch.stack(images) if images else torch.empty(0, 3, self.size, self.size)
        target, index = (torch.tensor([s[k] for s in samples], dtype=torch.int64) for k in (1, 2))
        return Batch(stacked, target, index)


def _decode(record: Record) -> Image.Image:
    try:
        return record.images.read(record.position)
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises for damaged files
        raise CorruptImageError(
            f"{record.images.locate(record.position)} (sample index {record.index}) cannot be read as an image: "
            f"{error}. Replace the file, or delete it to train without it."
        ) from error
