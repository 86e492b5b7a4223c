"""A seeded random subset of an image folder as one tensor, for benchmarks that leave Lightning out."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def load_folder(
    folder: Path, count: int, side: int, mean: Sequence[float], std: Sequence[float], seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Load images and labels.

    Args:
        folder: Holds a folder per class.
        count: Number of images.
        side: Pixels of the square that images are resized to.
        mean: Per channel, for values in [0, 1].
        std: Per channel.
        seed: Of the choice and the order.

    Returns:
        Images (count, 3, side, side) and class positions (count,).
    """
    files = sorted(path for path in folder.glob("*/*") if path.suffix.lower() in (".png", ".jpg", ".jpeg"))
    if len(files) < count:
        raise SystemExit(f"{folder} holds {len(files)} images, {count} are needed")
    classes = sorted({path.parent.name for path in files})
    order = torch.randperm(len(files), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    chosen = [files[i] for i in order]
    pixels = np.stack([
        np.asarray(Image.open(file).convert("RGB").resize((side, side), Image.Resampling.BICUBIC)) for file in chosen
    ])
    images = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    images = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return images, torch.tensor([classes.index(file.parent.name) for file in chosen])
