"""Mean and variance of the channels of all samples, whatever the batches."""

import torch
from torch import Tensor

from lqf_lightning.linear.reducer import Reducer


class PooledMoments:
    r"""Mean and variance of each channel, merged over batches and processes as if the data had come at once.

    .. math:: n = n_1 + n_2, \quad m = m_1 + \frac{n_2}{n} (m_2 - m_1), \quad
        S = S_1 + S_2 + \frac{n_1 n_2}{n} (m_2 - m_1)^2

    with sums of squared deviations S (Chan, Golub and LeVeque, 1983), in double precision.

    Args:
        like: Gives the number of channels and the device (C,).

    Attributes:
        count: Number of values per channel.
        mean: Mean (C,).
        squares: Sum of squared deviations from the mean (C,).

    Example:
        >>> import torch
        >>> moments = PooledMoments(torch.zeros(1))
        >>> moments.add(torch.tensor([[1.0], [2.0]]))
        >>> moments.add(torch.tensor([[6.0]]))
        >>> moments.mean.tolist(), moments.variance.tolist()
        ([3.0], [7.0])
    """

    def __init__(self, like: Tensor) -> None:
        self.count = torch.zeros((), dtype=torch.float64, device=like.device)
        self.mean = torch.zeros_like(like, dtype=torch.float64)
        self.squares = torch.zeros_like(like, dtype=torch.float64)

    @property
    def variance(self) -> Tensor:
        """Unbiased variance (C,), as torch's batch normalization keeps it; NaN for fewer than two values."""
        return self.squares / (self.count - 1)

    def add(self, activations: Tensor) -> None:
        """Merge a batch.

        Args:
            activations: Values (B, C, ...).
        """
        values = activations.detach().to(torch.float64).transpose(0, 1).flatten(1)
        count = values.shape[1]
        if count == 0:
            return
        mean = values.mean(1)
        squares = (values - mean[:, None]).square().sum(1)
        gap, total = mean - self.mean, self.count + count
        self.squares += squares + gap.square() * (self.count * count / total)
        self.mean += gap * (count / total)
        self.count = total

    def reduce(self, reducer: Reducer) -> None:
        """Merge with the other processes.

        Args:
            reducer: Speaks to them; a process without values takes part.
        """
        count = reducer.sum_(self.count.clone())
        mean = reducer.sum_(self.mean * self.count) / count.clamp(min=1)
        self.squares = reducer.sum_(self.squares + self.count * (self.mean - mean).square())
        self.count, self.mean = count, mean
