"""Ridge regression on features, from sums that one pass collects."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lqf_lightning.linear.reducer import Reducer


class RidgeProbe:
    r"""The linear classifier that minimizes a squared loss on one-hot targets.

    .. math:: \frac{1}{2n} \sum_i \lVert W x_i + b - e_{y_i} \rVert^2 + \frac{\rho\,\bar v}{2} \lVert W \rVert^2

    with the intercept b free of penalty and :math:`\bar v` the mean variance of the features, so that the ridge
    :math:`\rho` has no unit. Only sums over samples are kept (F x F and F x C, float64): memory does not grow with the
    data set, and sums over ranks give the solution of all samples.

    Args:
        features: Number of features F.
        classes: Number of classes C.
        device: Where the sums are kept.

    Example:
        >>> probe = RidgeProbe(1, 2)
        >>> probe.update(torch.tensor([[-1.0], [1.0]]), torch.tensor([0, 1]))
        >>> weight, bias = probe.solve([1.0])
        >>> weight[0].tolist(), bias[0].tolist()
        ([[-0.25], [0.25]], [0.5, 0.5])
    """

    def __init__(self, features: int, classes: int, device: torch.device | str = "cpu") -> None:
        self.classes = classes
        self._second = torch.zeros(features + 1, features + 1, dtype=torch.float64, device=device)
        self._cross = torch.zeros(features + 1, classes, dtype=torch.float64, device=device)

    def update(self, features: Tensor, target: Tensor) -> None:
        """Add samples.

        Args:
            features: Rows x_i (B, F).
            target: Class positions (B,).
        """
        rows = F.pad(features.double(), (0, 1), value=1.0)
        self._second += rows.T @ rows
        self._cross += rows.T @ F.one_hot(target, self.classes).double()

    def reduce(self, reducer: Reducer) -> None:
        """Add the sums of all ranks.

        Args:
            reducer: Sums over ranks in place.
        """
        reducer.sum_(self._second)
        reducer.sum_(self._cross)

    def solve(self, ridges: Sequence[float]) -> tuple[Tensor, Tensor]:
        """The minimizer for each of several ridges, from one eigendecomposition.

        Args:
            ridges: Values of rho, positive.

        Returns:
            Weights (R, C, F) and intercepts (R, C), float64.

        Raises:
            ValueError: No sample was added, or there is no ridge, or one that is not positive.
        """
        number = self._second[-1, -1]
        if number == 0:
            raise ValueError("the probe has seen no sample; call update first")
        if not ridges or not all(ridge > 0 for ridge in ridges):
            raise ValueError(
                f"ridges must be positive numbers, at least one, got {list(ridges)}. "
                "Set callbacks.linear_probe.ridges=[0.001,0.1]"
            )
        mean, share = self._second[:-1, -1] / number, self._cross[-1] / number
        covariance = self._second[:-1, :-1] / number - torch.outer(mean, mean)
        cross = self._cross[:-1] / number - torch.outer(mean, share)
        values, vectors = torch.linalg.eigh(covariance)
        # Of constant features nothing but rounding is left, which no division may blow up.
        rounding = 1e-15 * self._second.diagonal()[:-1].mean() / number + 1e-300
        damping = torch.tensor(ridges, dtype=values.dtype, device=values.device) * torch.maximum(
            values.mean(), rounding
        )
        inverse = 1.0 / (values.clamp(min=0)[None] + damping[:, None])  # (R, F)
        weight = torch.einsum("fe,re,ec->rcf", vectors, inverse, vectors.T @ cross)
        return weight, share - weight @ mean
