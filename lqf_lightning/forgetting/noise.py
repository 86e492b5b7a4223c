"""Gaussian noise that hides where exactly the weights of a scrubbed model are."""

import math
from collections.abc import Mapping
from typing import Protocol, Self

from torch import Tensor

from lqf_lightning.forgetting.standard_normal import Tensors, standard_normal
from lqf_lightning.linear.metric import dot


class Noise(Protocol):
    r"""Noise :math:`n \sim N(0, \Sigma)` that is added to the scrubbed and, in the mind, to the retrained weights.

    All weights of one model are hidden by one draw. A second draw for the same weights, released too, is a second
    answer about them: the information adds up.
    """

    def draw(self, like: Mapping[str, Tensor], seed: int) -> Tensors:
        """Draw the noise.

        Args:
            like: Weights by parameter name, for names, shapes, types and devices.
            seed: Of the draw. The numbers depend on it and on the names alone: every rank of any number of them, and
                every device, has the same (on a device up to its rounding).

        Returns:
            The noise by parameter name.
        """
        ...

    def information(self, change: Mapping[str, Tensor]) -> float:
        r"""What the noisy weights still tell, :math:`\frac12 d^T \Sigma^{-1} d`.

        The Kullback-Leibler divergence between the noisy scrubbed and the noisy retrained weights, for the same noise
        on both sides.

        Args:
            change: d, scrubbed less retrained weights by parameter name.

        Returns:
            Information in nats.
        """
        ...

    def worst_information(self, distance: float) -> float:
        r"""The largest `information` of all changes of at most this length.

        Args:
            distance: Upper bound of the Euclidean norm of the change, in the unit of the weights.

        Returns:
            :math:`\delta^2 / (2 \lambda_{\min}(\Sigma))` in nats.
        """
        ...


class IsotropicNoise:
    r"""The same noise for every weight, :math:`\Sigma = \sigma^2 I`.

    Papers print the noise as sigma^2 eps and plot its standard deviation (arXiv 2012.13431, equations 2 and 13); here
    sigma is the standard deviation, `n = sigma eps`.

    Args:
        sigma: Standard deviation, in the unit of the weights.

    Raises:
        ValueError: Sigma is not positive and finite.

    Example:
        >>> import torch
        >>> noise = IsotropicNoise(0.5)
        >>> noise.information({"weight": torch.tensor([3.0, 4.0])}), noise.worst_information(5.0)
        (50.0, 50.0)
        >>> float(noise.draw({"weight": torch.zeros(10_000)}, seed=0)["weight"].std().round(decimals=2))
        0.5
    """

    def __init__(self, sigma: float) -> None:
        if not 0 < sigma < math.inf:
            raise ValueError(f"the standard deviation of noise must be positive and finite, got {sigma}")
        self.sigma = sigma

    def draw(self, like: Mapping[str, Tensor], seed: int) -> Tensors:
        """Draw the noise, as in `Noise`.

        Args:
            like: Weights by parameter name.
            seed: Of the draw.

        Returns:
            The noise by parameter name.
        """
        return {name: (self.sigma * entry).to(like[name]) for name, entry in standard_normal(like, seed).items()}

    def information(self, change: Mapping[str, Tensor]) -> float:
        r"""What the noisy weights still tell, :math:`\lVert d \rVert^2 / (2 \sigma^2)`.

        Args:
            change: d by parameter name.

        Returns:
            Information in nats.
        """
        return 0.5 * dot(dict(change), dict(change)) / self.sigma / self.sigma

    def worst_information(self, distance: float) -> float:
        """The same for any change of at most this length.

        Args:
            distance: Upper bound of the Euclidean norm of the change.

        Returns:
            Information in nats.
        """
        return worst_case(distance, self.sigma)


class DiagonalNoise:
    """Independent noise of another variance for every weight.

    Args:
        variance: Variances by parameter name, in the shapes of the weights.

    Raises:
        ValueError: A variance is not positive and finite.

    Example:
        >>> import torch
        >>> noise = DiagonalNoise.optimal({"weight": torch.tensor([1.0, 4.0])}, scale=2.0)
        >>> noise.variance["weight"].tolist()
        [2.0, 1.0]
        >>> noise.information({"weight": torch.tensor([2.0, 1.0])}), noise.worst_information(2.0)
        (1.5, 2.0)
    """

    def __init__(self, variance: Mapping[str, Tensor]) -> None:
        for name, entry in variance.items():
            if not bool(((entry > 0) & entry.isfinite()).all()):
                raise ValueError(f"variances must be positive and finite; some of {name!r} are not")
        self.variance = {name: entry.double() for name, entry in variance.items()}

    @classmethod
    def optimal(cls, curvature: Mapping[str, Tensor], scale: float) -> Self:
        r"""The noise that hides a residual error of a scrub at the least cost in loss, :math:`\Sigma = s B^{-1/2}`.

        The diagonal form of `optimal_covariance` for a residual error that is alike in all directions.

        Args:
            curvature: Diagonal of B, the Hessian of the mean objective on the retained samples with its penalty.
            scale: :math:`s = \sqrt{\lambda} \sigma_h`.

        Returns:
            The noise.

        Raises:
            ValueError: The scale or an entry of the curvature is not positive and finite.
        """
        if not 0 < scale < math.inf:
            raise ValueError(f"the scale of noise must be positive and finite, got {scale}")
        for name, entry in curvature.items():
            if not bool(((entry > 0) & entry.isfinite()).all()):
                raise ValueError(f"the curvature of {name!r} must be positive and finite: add the ridge to it")
        return cls({name: scale * entry.double().rsqrt() for name, entry in curvature.items()})

    def draw(self, like: Mapping[str, Tensor], seed: int) -> Tensors:
        """Draw the noise, as in `Noise`.

        Args:
            like: Weights by parameter name.
            seed: Of the draw.

        Returns:
            The noise by parameter name. Refusals are those of other names than the variances have.
        """
        self._check(like)
        drawn = standard_normal(like, seed)
        return {name: (entry * self.variance[name].sqrt().cpu()).to(like[name]) for name, entry in drawn.items()}

    def information(self, change: Mapping[str, Tensor]) -> float:
        r"""What the noisy weights still tell, :math:`\frac12 \sum_j d_j^2 / v_j`.

        Args:
            change: d by parameter name.

        Returns:
            Information in nats.
        """
        self._check(change)
        scaled = {name: entry.double() / self.variance[name].to(entry.device) for name, entry in change.items()}
        return 0.5 * dot(dict(change), scaled)

    def worst_information(self, distance: float) -> float:
        """The same for any change of at most this length: all of it where the noise is weakest.

        Args:
            distance: Upper bound of the Euclidean norm of the change.

        Returns:
            Information in nats.
        """
        return worst_case(distance, math.sqrt(min(float(entry.min()) for entry in self.variance.values())))

    def _check(self, weights: Mapping[str, Tensor]) -> None:
        if odd := sorted(set(weights).symmetric_difference(self.variance)):
            raise ValueError(f"the noise has variances of other parameters than these; the first odd one is {odd[0]!r}")


def worst_case(distance: float, deviation: float) -> float:
    r"""The information of a change of some length where the noise is weakest, :math:`\delta^2 / (2 s^2)` in nats.

    Args:
        distance: Upper bound delta of the Euclidean norm of the change; infinity gives infinity.
        deviation: s, the smallest standard deviation of the noise in any direction.

    Returns:
        Information in nats.

    Raises:
        ValueError: The distance is negative or not a number.

    Example:
        >>> worst_case(1.0, 0.5)
        2.0
    """
    if not distance >= 0:
        raise ValueError(f"the bound of a distance must not be negative, got {distance}")
    return 0.5 * (distance / deviation) * (distance / deviation)
