"""Gaussian noise shaped by the Kronecker-factored curvature: strong where the loss does not mind."""

import math
from collections.abc import Mapping
from typing import Self

from torch import Tensor

from lqf_lightning.forgetting.noise import worst_case
from lqf_lightning.forgetting.standard_normal import Tensors, standard_normal
from lqf_lightning.linear.kfac import KFAC
from lqf_lightning.linear.metric import dot


class KroneckerNoise:
    r"""Noise of covariance :math:`\Sigma = s\,B^{-p}` with :math:`B = H + \mu I` and Kronecker factors for H.

    The powers are taken of the eigenvalues of each layer's `A (x) G`, in the eigenbases that the factors have anyway;
    nothing is inverted anew. Parameters that the factors cover without a Kronecker block have their diagonal of H, as
    in `KFAC`. Parameters that they do not cover, an intercept above all, count as curvature 1, what an intercept has
    in the mean squared loss. For p = 1/2 the noise is optimal for the loss, see `optimal_covariance`; p = 1, the shape
    of a posterior, is what code for Fisher forgetting uses (arXiv 1911.04933). It is the exact optimum where the
    factors are exact; elsewhere it is a valid noise and its information exact, its cost in loss not the least.

    Args:
        kfac: Kronecker factors of the mean-form Gauss-Newton matrix, of the retained samples or of data that may stay.
        ridge: mu, the strength of the penalty in the mean objective.
        scale: s; for p = 1/2 it is :math:`\sqrt{\lambda} \sigma_h`.
        power: p, at most 1.

    Raises:
        ValueError: The ridge, the scale or the power is not positive and finite, or the power is above 1.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> from lqf_lightning.linear import fit_kfac
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]], dtype=torch.float64)
        >>> kfac = fit_kfac(nn.Linear(2, 1, bias=False).double(), None, [x], damping=0.5)  # H = diag(0.5, 2)
        >>> noise = KroneckerNoise.optimal(kfac, ridge=2.0, scale=1.0)  # variances 2.5^(-1/2) and 4^(-1/2)
        >>> round(noise.information({"weight": torch.tensor([[0.0, 1.0]]).double()}), 9)
        1.0
    """

    def __init__(self, kfac: KFAC, *, ridge: float, scale: float, power: float = 0.5) -> None:
        if not (0 < ridge < math.inf and 0 < scale < math.inf and 0 < power <= 1):
            raise ValueError(
                f"expected a positive ridge, a positive scale and a power of at most 1, got ridge={ridge}, "
                f"scale={scale}, power={power}"
            )
        self.kfac, self.ridge, self.scale, self.power = kfac, ridge, scale, power

    @classmethod
    def optimal(cls, kfac: KFAC, ridge: float, scale: float) -> Self:
        r"""The noise that hides a residual error of a scrub at the least cost in loss, :math:`\Sigma = s B^{-1/2}`.

        Args:
            kfac: As in the constructor.
            ridge: mu.
            scale: :math:`s = \sqrt{\lambda} \sigma_h`.

        Returns:
            The noise.
        """
        return cls(kfac, ridge=ridge, scale=scale)

    def draw(self, like: Mapping[str, Tensor], seed: int) -> Tensors:
        r"""Draw the noise, :math:`\sqrt{s} B^{-p/2} \epsilon`, as in `Noise`.

        Args:
            like: Weights by parameter name; all parameters of the factors are among them.
            seed: Of the draw.

        Returns:
            The noise by parameter name, on the device of the weights.
        """
        drawn = {name: entry.to(like[name].device) for name, entry in _wide(like, seed).items()}
        shaped = self._power(drawn, -0.5 * self.power)
        return {name: (math.sqrt(self.scale) * shaped[name]).to(like[name]) for name in like}

    def information(self, change: Mapping[str, Tensor]) -> float:
        r"""What the noisy weights still tell, :math:`\frac{1}{2 s} d^T B^p d`.

        Args:
            change: d by parameter name; all parameters of the factors are among them.

        Returns:
            Information in nats.
        """
        return 0.5 * dot(dict(change), self._power(dict(change), self.power)) / self.scale

    def worst_information(self, distance: float) -> float:
        """The same for any change of at most this length: all of it where the curvature is largest.

        Curvature 1 counts as present, for the parameters that the factors do not cover.

        Args:
            distance: Upper bound of the Euclidean norm of the change.

        Returns:
            Information in nats.
        """
        # The largest eigenvalue of a product is the product of the largest; both bases are orthogonal.
        tops = [float(values.max()) for values, _, _ in self.kfac._bases.values()]
        tops += [float(diagonal.max()) for diagonal in self.kfac.diagonals.values()]
        top = max([*(value + self.ridge for value in tops), 1.0])
        return worst_case(distance, math.sqrt(self.scale * top**-self.power))

    def _power(self, tensors: Tensors, power: float) -> Tensors:
        covered = {name: entry for name, entry in tensors.items() if name in self.kfac.names}
        return tensors | self.kfac._map(covered, lambda values, _: (values + self.ridge) ** power)


def _wide(like: Mapping[str, Tensor], seed: int) -> Tensors:
    # MPS has no double precision; the numbers are the same, rounded once.
    drawn = standard_normal(like, seed)
    return {name: entry.float() if like[name].device.type == "mps" else entry for name, entry in drawn.items()}
