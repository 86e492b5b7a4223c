"""How a network wants its images, and how to show it images that were prepared for another."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor
from torch.nn import functional as F

Channels = tuple[float, float, float]


@dataclass(frozen=True)
class View:
    """Size and normalization of a network's images.

    Attributes:
        image_size: Side in pixels.
        crop_fraction: Share of the shorter side that evaluation keeps.
        mean: Channel means that pixels in [0, 1] are shifted by.
        std: Channel deviations that they are then divided by.
    """

    image_size: int
    crop_fraction: float
    mean: Channels
    std: Channels

    def translate(
        self, images: Tensor, mean: Sequence[float] | None = None, std: Sequence[float] | None = None
    ) -> Tensor:
        """Bring images that were prepared for another network into this view.

        Args:
            images: Normalized images (B, 3, H, H).
            mean: Channel means that they were shifted by; None: as in this view.
            std: Channel deviations that they were divided by; None: as in this view.

        Returns:
            The same part of the same images in this view's size and normalization (B, 3, image_size, image_size);
            `crop_fraction` plays no part, because what was cut away is gone.

        Example:
            >>> import torch
            >>> view = View(1, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
            >>> white = torch.ones(1, 3, 1, 1)
            >>> view.translate(white, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).flatten().tolist()  # 1 is white there and here
            [1.0, 1.0, 1.0]
            >>> view.translate(0.25 * white, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)).flatten().tolist()
            [-0.5, -0.5, -0.5]
        """
        given = (tuple(self.mean if mean is None else mean), tuple(self.std if std is None else std))
        if given != (tuple(self.mean), tuple(self.std)):
            there = [images.new_tensor(values).view(-1, 1, 1) for values in given]
            here = [images.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std)]
            images = images * (there[1] / here[1]) + (there[0] - here[0]) / here[1]
        if images.shape[-1] != self.image_size and len(images):
            size = [self.image_size, self.image_size]
            images = F.interpolate(images, size, mode="bicubic", antialias=True, align_corners=False)
        return images
