"""Where the pixels of a sample come from: files, or one array in memory."""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
from PIL import Image


class Images(Protocol):
    """A numbered collection of images."""

    def read(self, position: int) -> Image.Image:
        """Decode one image as 8-bit RGB."""

    def content(self, position: int) -> bytes:
        """Bytes that identify the image: two images are the same if and only if these are."""

    def locate(self, position: int) -> str:
        """Tell a person where the image is."""


class FileImages:
    """Images in files, decoded when asked for.

    Args:
        root: Folder that the paths are relative to.
        paths: One path per image, with forward slashes.
    """

    def __init__(self, root: str | Path, paths: Sequence[str]) -> None:
        self.root = str(root)
        self.paths = list(paths)

    def read(self, position: int) -> Image.Image:
        """Decode one image as 8-bit RGB; gray, palette, transparent and 16-bit images are converted.

        Args:
            position: Place in `paths`.

        Returns:
            The image at its own size.
        """
        with Image.open(self.locate(position)) as image:
            return _as_rgb(image)

    def content(self, position: int) -> bytes:
        """Read the bytes of the file.

        Args:
            position: Place in `paths`.

        Returns:
            The undecoded file.
        """
        return Path(self.locate(position)).read_bytes()

    def locate(self, position: int) -> str:
        """Tell where the image is.

        Args:
            position: Place in `paths`.

        Returns:
            The path of the file.
        """
        return f"{self.root}/{self.paths[position]}"


class ArrayImages:
    """Images in one array.

    Args:
        pixels: 8-bit images (N, H, W) in gray or (N, H, W, 3) in RGB.
        name: What to call the array in messages.
    """

    def __init__(self, pixels: npt.NDArray[np.uint8], name: str) -> None:
        self.pixels = pixels
        self.name = name

    def read(self, position: int) -> Image.Image:
        """Wrap one image as 8-bit RGB.

        Args:
            position: Place in the array.

        Returns:
            The image at its own size.
        """
        return _as_rgb(Image.fromarray(self.pixels[position]))

    def content(self, position: int) -> bytes:
        """Give the pixels, led by their shape so that a 2x8 image never equals a 4x4 one.

        Args:
            position: Place in the array.

        Returns:
            Shape and pixels.
        """
        pixels: npt.NDArray[np.uint8] = self.pixels[position]
        return str(pixels.shape).encode() + pixels.tobytes()

    def locate(self, position: int) -> str:
        """Tell where the image is.

        Args:
            position: Place in the array.

        Returns:
            Name and position.
        """
        return f"{self.name}, image {position}"


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode in {"I;16", "I;16B", "I;16L"}:  # convert() would clip everything above 255 to white
        return Image.fromarray((np.asarray(image).astype(np.uint16) >> 8).astype(np.uint8)).convert("RGB")
    if image.mode in {"I", "F"}:
        raise OSError(f"pixels of type {image.mode} have no known range; store the image with 8 or 16 bits per channel")
    if image.mode == "P":  # a palette with transparency has to pass through RGBA
        return image.convert("RGBA").convert("RGB")
    return image.convert("RGB")
