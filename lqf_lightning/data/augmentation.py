"""Random changes of a training image.

An augmentation is built with the size that the network sees and maps an image to a square image of that size. It may
draw from the generators of torch, NumPy and Python: the data set seeds all three per sample and epoch.
"""

from PIL import Image
from torchvision.transforms import v2


def fit(image: Image.Image, size: int, crop_fraction: float) -> Image.Image:
    """Resize the shorter side to `size / crop_fraction` and cut the center square, without randomness.

    Args:
        image: Any RGB image.
        size: Side of the result in pixels.
        crop_fraction: Share of the shorter side that is kept.

    Returns:
        A square image of `size` pixels.
    """
    scaled: Image.Image = v2.functional.resize(image, [round(size / crop_fraction)], v2.InterpolationMode.BICUBIC)
    square: Image.Image = v2.functional.center_crop(scaled, [size, size])
    return square


class NoAugmentation:
    """Training images as they are evaluated: without randomness.

    Args:
        size: Side of the result in pixels.
        crop_fraction: Share of the shorter side that is kept.
    """

    random = False

    def __init__(self, size: int, crop_fraction: float) -> None:
        self.size = size
        self.crop_fraction = crop_fraction

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resize and cut the center.

        Args:
            image: Any RGB image.

        Returns:
            A square image.
        """
        return fit(image, self.size, self.crop_fraction)


class Shift(NoAugmentation):
    """Move the image by a few pixels; its edge fills what becomes empty.

    Args:
        size: Side of the result in pixels.
        crop_fraction: Share of the shorter side that is kept before the move.
        shift: Largest move in each direction, as a share of `size`.
    """

    random = True

    def __init__(self, size: int, crop_fraction: float, shift: float = 0.125) -> None:
        super().__init__(size, crop_fraction)
        self.move = v2.RandomCrop(size, padding=round(shift * size), padding_mode="edge")

    def __call__(self, image: Image.Image) -> Image.Image:
        """Resize, cut the center and move.

        Args:
            image: Any RGB image.

        Returns:
            A square image.
        """
        moved: Image.Image = self.move(super().__call__(image))
        return moved


class Crop:
    """A random part of the image, stretched to a square: zoom and place change, orientation does not.

    Args:
        size: Side of the result in pixels.
        crop_fraction: Unused; the part is drawn from `scale`.
        scale: Smallest and largest share of the area.
        flip: Probability of a horizontal flip.
        operations: Random color and shape changes of RandAugment (Cubuk et al., 2020), applied after the crop.
        magnitude: Strength of these changes, from 0 to 30.
    """

    random = True

    def __init__(
        self,
        size: int,
        crop_fraction: float,
        scale: tuple[float, float] = (0.35, 1.0),
        flip: float = 0.0,
        operations: int = 0,
        magnitude: int = 9,
    ) -> None:
        steps = [v2.RandomResizedCrop(size, scale=tuple(scale), interpolation=v2.InterpolationMode.BICUBIC)]
        if flip:
            steps.append(v2.RandomHorizontalFlip(flip))
        if operations:
            steps.append(v2.RandAugment(operations, magnitude))
        self.steps = v2.Compose(steps)

    def __call__(self, image: Image.Image) -> Image.Image:
        """Draw the part and the changes.

        Args:
            image: Any RGB image.

        Returns:
            A square image.
        """
        changed: Image.Image = self.steps(image)
        return changed


class CropFlip(Crop):
    """A random part of the image, mirrored half of the time.

    Args:
        size: Side of the result in pixels.
        crop_fraction: Unused; the part is drawn from `scale`.
        scale: Smallest and largest share of the area.
    """

    def __init__(self, size: int, crop_fraction: float, scale: tuple[float, float] = (0.35, 1.0)) -> None:
        super().__init__(size, crop_fraction, scale, flip=0.5)


class RandAugment(Crop):
    """A random part, mirrored half of the time, then changed in color and shape (Cubuk et al., 2020).

    Args:
        size: Side of the result in pixels.
        crop_fraction: Unused; the part is drawn from `scale`.
        scale: Smallest and largest share of the area.
        operations: Number of changes per image.
        magnitude: Strength of the changes, from 0 to 30.
    """

    def __init__(
        self,
        size: int,
        crop_fraction: float,
        scale: tuple[float, float] = (0.35, 1.0),
        operations: int = 2,
        magnitude: int = 9,
    ) -> None:
        super().__init__(size, crop_fraction, scale, flip=0.5, operations=operations, magnitude=magnitude)
