"""Second-order pooling: the square root of the covariance of the last feature map, in place of its average."""

import random

import torch
from torch import Tensor, nn

from lqf_lightning.backbones.covariance_root import covariance_root

_SEED = 0


class SecondOrderPooling(nn.Module):
    r"""Pool a feature map by how its channels vary together over places.

    The features are the upper triangle of :math:`(P^T \Sigma P)^{1/2}`, off-diagonals times :math:`\sqrt 2`, with the
    covariance :math:`\Sigma` of the map's vectors over places (MPN-COV: Li et al., "Is Second-order Information
    Helpful for Large-scale Visual Recognition?", ICCV 2017; on a linearized network B-LQF, arXiv 2012.11140, Table 2).
    P is a fixed random projection of F channels to W orthogonal directions, which keeps 1280 channels from giving
    819,840 features. It holds no parameter: it is the same for the same F and W, on every machine and in every version.

    P is :math:`\sqrt{F / W}` times an isometry, so that the squared norm of the features is, whatever W and up to
    the projection, the map's total variance over places, and with the average the mean squared norm of its vectors.
    That is of the order of the squared norm of the average alone, on which the logits of a new head depend, so that
    ``head_std`` keeps its meaning; less where a map has few and similar places.

    Args:
        channels: Number of channels F.
        width: Number of directions W.
        iterations: Newton-Schulz iterations of the root, see :func:`covariance_root`.
        with_average: Whether the F averages follow as further features.
        keep_places: Whether features come as (B, D, 1, 1), for heads that are a convolution.

    Attributes:
        features: Their number D = W (W + 1) / 2, and F more with the average.

    Raises:
        ValueError: If there are not between 2 and F directions.

    Example:
        >>> pooling = SecondOrderPooling(channels=8, width=3)
        >>> pooling(torch.randn(2, 8, 5, 5)).shape
        torch.Size([2, 6])
    """

    projection: Tensor
    triangle: Tensor
    weight_of_entry: Tensor

    def __init__(
        self,
        channels: int,
        width: int,
        *,
        iterations: int = 5,
        with_average: bool = False,
        keep_places: bool = False,
    ) -> None:
        super().__init__()
        if not 2 <= width <= channels:
            raise ValueError(
                f"got backbone.pooling_width={width}, expected 2 to {channels}, the number of channels of the last map."
                f" Set backbone.pooling_width={min(64, channels)}"
            )
        self.iterations, self.with_average, self.keep_places = iterations, with_average, keep_places
        # Not in the state dict, so that a file of weights fits a network with either pooling.
        self.register_buffer("projection", _project(channels, width), persistent=False)
        rows, columns = torch.triu_indices(width, width)
        weight = torch.where(rows == columns, 1.0, 2.0**0.5)
        self.register_buffer("triangle", rows * width + columns, persistent=False)
        self.register_buffer("weight_of_entry", weight, persistent=False)

    @property
    def features(self) -> int:
        """Number of features D."""
        channels, width = self.projection.shape
        return width * (width + 1) // 2 + channels * self.with_average

    def forward(self, maps: Tensor) -> Tensor:
        """Pool.

        Args:
            maps: Feature maps (B, F, H, W).

        Returns:
            Features (B, D), or (B, D, 1, 1).
        """
        # Half precision has too few digits for a product of matrices that is to reach their root.
        with torch.autocast(maps.device.type, enabled=False):
            wide = maps.float() if maps.dtype in (torch.float16, torch.bfloat16) else maps
            root = covariance_root(self.projection.to(wide.dtype).mT @ wide.flatten(2), self.iterations)
            pooled = root.flatten(1)[:, self.triangle] * self.weight_of_entry.to(wide.dtype)
            pooled = torch.cat([pooled, wide.mean((2, 3))], 1) if self.with_average else pooled
        pooled = pooled.to(maps.dtype)
        return pooled[:, :, None, None] if self.keep_places else pooled

    def extra_repr(self) -> str:
        """Describe the sizes.

        Returns:
            Channels, directions and features.
        """
        channels, width = self.projection.shape
        return f"channels={channels}, width={width}, features={self.features}"


def _project(channels: int, width: int) -> Tensor:
    # Python's generator gives the same numbers in every version, which torch's does not promise; with the signs of R
    # made positive, the factor Q is unique. A head that was trained behind it stays right.
    draw = random.Random(_SEED)
    numbers = torch.tensor([draw.random() - 0.5 for _ in range(channels * width)], dtype=torch.float64)
    basis, triangle = torch.linalg.qr(numbers.view(channels, width))
    projection: Tensor = basis * triangle.diagonal().sign() * (channels / width) ** 0.5
    return projection.float()
