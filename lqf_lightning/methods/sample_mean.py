"""A mean over samples that keeps NaN."""

import torch
from torch import Tensor
from torchmetrics import Metric


class SampleMean(Metric):
    """Mean of a per-sample quantity, from batch means and batch sizes, exact on uneven ranks.

    torchmetrics' `MeanMetric` either drops NaN, so that a diverged run looks healthy, or ignores the weights
    (``nan_strategy="disable"``, version 1.9).

    Example:
        >>> mean = SampleMean()
        >>> mean.update(torch.tensor(1.0), 3)
        >>> mean.update(torch.tensor(5.0), 1)
        >>> mean.compute().item()
        2.0
    """

    total: Tensor
    count: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")
        self.add_state("count", torch.zeros((), dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, value: Tensor, size: int | Tensor) -> None:
        """Add a batch.

        Args:
            value: Mean over the batch, a scalar.
            size: Number of samples in it; 0 leaves `value` out. Where it is a tensor, `value` must be finite even then:
                to look at the size would make the device wait.
        """
        # A module in half precision takes its metrics along, and bfloat16 cannot count beyond 256.
        self.total, self.count = self.total.double(), self.count.double()
        if isinstance(size, Tensor) or size:
            self.total += value.detach().double() * size
        self.count += size

    def compute(self) -> Tensor:
        """Mean over all samples of all ranks.

        Returns:
            A scalar, NaN without samples.
        """
        return (self.total / self.count).float()
