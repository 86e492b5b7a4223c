"""Samples as tensors, keyed so that chance depends on the sample and the epoch alone."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

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
        target: Position of the class; -1 where it is unknown or hidden.
        index: Row of the manifest.
    """

    images: Images
    position: int
    target: int
    index: int


Normalization = tuple[Sequence[float], Sequence[float]]
Input = Tensor | tuple[Tensor, ...]
Sample = tuple[Input, int, int]


class ImageDataset(Dataset[Sample]):
    """Samples of one split; an item is (image (3, H, W), target, index), or a tuple of views in place of the image.

    A plain position as key gives the sample with transforms seeded for epoch 0; a key (epoch, position) for that epoch;
    a key (epoch, position, round) where samples come several times in an epoch. What is drawn depends on (seed, epoch,
    index), and on the round where there is one: not on the number of processes or workers, nor on what was loaded
    before.

    Args:
        records: The samples.
        transform: Maps an RGB image to a square image of fixed size, or to a tuple of them.
        normalization: Mean and standard deviation per channel, for pixels in [0, 1].
        seed: Seed of the run.
        cache: Keep the transformed images in memory; for transforms without randomness.
    """

    def __init__(
        self,
        records: Sequence[Record],
        transform: Callable[[Image.Image], Image.Image | tuple[Image.Image, ...]],
        normalization: Normalization,
        seed: int = 0,
        *,
        cache: bool = False,
    ) -> None:
        self.records = records
        self.transform = transform
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in normalization)
        self.seed = seed
        self.cache: dict[int, Input] | None = {} if cache else None

    def __len__(self) -> int:
        """Count the samples.

        Returns:
            N.
        """
        return len(self.records)

    def __getitem__(self, key: int | tuple[int, ...]) -> Sample:
        """Load, transform and normalize one sample.

        Args:
            key: Position, (epoch, position) or (epoch, position, round).

        Returns:
            Image or views, target and index.
        """
        epoch, position, *rounds = key if isinstance(key, tuple) else (0, key)
        record = self.records[position]
        pixels = self._pixels(record, epoch, *rounds)
        if isinstance(pixels, tuple):
            return tuple(map(self._normalized, pixels)), record.target, record.index
        return self._normalized(pixels), record.target, record.index

    def _normalized(self, pixels: Tensor) -> Tensor:
        return (pixels.float() / 255 - self.mean) / self.std

    def _pixels(self, record: Record, epoch: int, *rounds: int) -> Input:
        if self.cache is not None and record.index in self.cache:
            return self.cache[record.index]
        image = _decode(record)
        to_tensor = v2.functional.pil_to_tensor
        with seeded(mix_seed(self.seed, epoch, record.index, *rounds)):
            drawn = self.transform(image)
        pixels: Input = tuple(map(to_tensor, drawn)) if isinstance(drawn, tuple) else to_tensor(drawn)
        if self.cache is not None:
            self.cache[record.index] = pixels
        return pixels


class Collate:
    """Stack samples into a batch; a batch may have no rows.

    Args:
        size: Side of the images in pixels.
        views: Views per sample, which a batch without rows cannot tell; 0: one image, not a tuple.
    """

    def __init__(self, size: int, views: int = 0) -> None:
        self.size = size
        self.views = views

    def __call__(self, samples: list[Sample]) -> Batch:
        """Stack.

        Args:
            samples: Items of an `ImageDataset`.

        Returns:
            The batch.
        """
        target, index = (torch.tensor([s[k] for s in samples], dtype=torch.int64) for k in (1, 2))
        return Batch(self._stack([sample[0] for sample in samples]), target, index)

    def _stack(self, inputs: list[Any]) -> Input:
        if not inputs:
            nothing = torch.empty(0, 3, self.size, self.size)
            return (nothing,) * self.views if self.views else nothing
        if isinstance(inputs[0], tuple):
            return tuple(torch.stack(view) for view in zip(*inputs, strict=True))
        return torch.stack(inputs)


def check_normalization(value: Normalization) -> None:
    """Check the normalization of a backbone.

    Args:
        value: Mean and standard deviation per channel.

    Raises:
        ValueError: They are not three, or a deviation is not positive.
    """
    mean, std = value
    if len(mean) != 3 or len(std) != 3 or min(std) <= 0:
        raise ValueError(f"`normalization` must be three means and three positive deviations, got {value}")


def _decode(record: Record) -> Image.Image:
    try:
        return record.images.read(record.position)
    except (OSError, ValueError, SyntaxError, EOFError) as error:  # what Pillow raises for damaged files
        raise CorruptImageError(
            f"{record.images.locate(record.position)} (sample index {record.index}) cannot be read as an image: "
            f"{error}. Replace the file, or delete it to train without it."
        ) from error
