"""Samples as small pictures."""

from collections.abc import Sequence
from typing import Any

from PIL import Image
from torchvision.transforms.functional import to_pil_image

from lqf_lightning.data.datamodule import ImageDataModule
from lqf_lightning.teachers import View

_SIDE = 96


def load_thumbnails(data: ImageDataModule, split: str, index: Sequence[int]) -> list[Image.Image]:
    """Read samples again, small, as much of them as the model of the run sees.

    Args:
        data: The data.
        split: Their split.
        index: Rows of the manifest (B,).

    Returns:
        B pictures of at most 96 pixels.
    """
    view = View(min(_SIDE, data.image_size), data.crop_fraction, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    place = {row: position for position, row in enumerate(data.manifest.rows(split)["index"].tolist())}
    samples: Any = data.view_dataloader(split, view).dataset
    return [to_pil_image(samples[place[row]][0]) for row in index]
