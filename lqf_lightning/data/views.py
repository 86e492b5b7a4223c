"""Several views of one image, for methods that learn from their agreement."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torchvision.transforms import v2

from lqf_lightning.data.option import check_option

_GROUP = "method.views"


class TwoViews:
    """Two random views of an image: part, color, sharpness and orientation change, what it shows does not.

    Each view is a random part, mirrored, with other colors, gray, blurred or solarized with the given probabilities.
    The defaults are those of MoCo v2 (Chen et al., 2020). Those of BYOL (Grill et al., 2020, appendix B) treat the two
    views differently: ``jitter=(0.4, 0.4, 0.2, 0.1), blur=(1.0, 0.1), solarize=(0.0, 0.2)``.

    Args:
        size: Side of the results in pixels.
        crop_fraction: Unused; the part is drawn from `scale`.
        weak: Unused; the views are drawn from the image itself.
        scale: Smallest and largest share of the area.
        flip: Probability of a horizontal flip.
        jitter: Largest change of brightness, contrast, saturation and hue.
        jitter_probability: Probability of these changes.
        grayscale: Probability of losing all color.
        blur: Probability of a blur, for the first and the second view.
        blur_sigma: Smallest and largest width of the blur in pixels; it reaches over a tenth of `size`.
        solarize: Probability of inverting all bright pixels, for the first and the second view.
    """

    random = True
    views = 2

    def __init__(
        self,
        size: int,
        crop_fraction: float,
        weak: Callable[[Image.Image], Image.Image] | None = None,
        *,
        scale: Sequence[float] = (0.2, 1.0),
        flip: float = 0.5,
        jitter: Sequence[float] = (0.4, 0.4, 0.4, 0.1),
        jitter_probability: float = 0.8,
        grayscale: float = 0.2,
        blur: Sequence[float] = (0.5, 0.5),
        blur_sigma: Sequence[float] = (0.1, 2.0),
        solarize: Sequence[float] = (0.0, 0.0),
    ) -> None:
        _check_interval("scale", scale, "[0.2,1.0]", 1.0)
        _check_interval("blur_sigma", blur_sigma, "[0.1,2.0]")
        for name, value in (("flip", flip), ("jitter_probability", jitter_probability), ("grayscale", grayscale)):
            check_option(name, value, 0 <= value <= 1, "a probability from 0 to 1", 0.5, _GROUP)
        for name, pair in (("blur", blur), ("solarize", solarize)):
            valid = len(pair) == 2 and all(0 <= value <= 1 for value in pair)
            check_option(name, pair, valid, "a probability from 0 to 1 for each of two views", "[0.5,0.5]", _GROUP)
        valid = len(jitter) == 4 and min(jitter) >= 0 and jitter[3] <= 0.5
        expected = "four numbers of at least 0, the last one (hue) at most 0.5"
        check_option("jitter", jitter, valid, expected, "[0.4,0.4,0.4,0.1]", _GROUP)
        kernel = max(3, size // 20 * 2 + 1)
        shared = [
            v2.RandomResizedCrop(size, scale=tuple(scale), interpolation=v2.InterpolationMode.BICUBIC),
            v2.RandomHorizontalFlip(flip),
            v2.RandomApply([v2.ColorJitter(*jitter)], jitter_probability),
            v2.RandomGrayscale(grayscale),
        ]
        self.steps = [
            v2.Compose([
                *shared,
                v2.RandomApply([v2.GaussianBlur(kernel, tuple(blur_sigma))], blurred),
                v2.RandomSolarize(128, solarized),
            ])
            for blurred, solarized in zip(blur, solarize, strict=True)
        ]

    def __call__(self, image: Image.Image) -> tuple[Image.Image, ...]:
        """Draw two views.

        Args:
            image: Any RGB image.

        Returns:
            Two square images.
        """
        return tuple(steps(image) for steps in self.steps)


class WeakStrong:
    """An image augmented as for ordinary training, and augmented anew and then changed in color and shape.

    FixMatch (Sohn et al., 2020, section 2.3): a label guessed from the weak view is taught on the strong one. The
    strong view ends with changes from RandAugment's list (Cubuk et al., 2020), all equally likely, each with a
    strength of its own: tenths of the greatest one, drawn from the integers of `magnitude`.

    Args:
        size: Side of the results in pixels; `weak` gives images of this side.
        crop_fraction: Unused; `weak` knows it.
        weak: The transform of ordinary training images.
        operations: Number of changes of a strong view.
        magnitude: Smallest and largest strength, from 0 to 10.
    """

    random = True
    views = 2

    def __init__(
        self,
        size: int,
        crop_fraction: float,
        weak: Callable[[Image.Image], Image.Image],
        *,
        operations: int = 2,
        magnitude: Sequence[int] = (1, 9),
    ) -> None:
        check_option("operations", operations, operations >= 1, "at least 1", 2, _GROUP)
        whole = len(magnitude) == 2 and all(isinstance(value, int) for value in magnitude)
        valid = whole and 0 <= magnitude[0] <= magnitude[1] <= 10
        expected = "two integers from 0 to 10, the smaller one first"
        check_option("magnitude", magnitude, valid, expected, "[1,9]", _GROUP)
        self.weak = weak
        self.operations = operations
        strengths = range(magnitude[0], magnitude[1] + 1)
        self.changes: list[Any] = [v2.RandAugment(1, strength, num_magnitude_bins=11) for strength in strengths]

    def __call__(self, image: Image.Image) -> tuple[Image.Image, ...]:
        """Draw both views.

        Args:
            image: Any RGB image.

        Returns:
            The weak and the strong view, two square images.
        """
        weak, strong = self.weak(image), self.weak(image)
        for choice in torch.randint(len(self.changes), (self.operations,)).tolist():
            strong = self.changes[choice](strong)
        return weak, strong


def _check_interval(name: str, value: Sequence[float], example: str, most: float = float("inf")) -> None:
    valid = len(value) == 2 and 0 < value[0] <= value[1] <= most
    limit = "" if most == float("inf") else f" and at most {most:g}"
    check_option(name, value, valid, f"two numbers above 0{limit}, the smaller one first", example, _GROUP)
