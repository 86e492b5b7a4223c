"""The noise that hides what a scrub has left at the least cost in loss, as a dense matrix."""

import torch
from torch import Tensor


def optimal_covariance(curvature: Tensor, residual: Tensor, strength: float) -> Tensor:
    r"""The covariance of noise that minimizes loss plus information.

    A scrub leaves an error h with covariance :math:`\Sigma_h`; noise :math:`N(0, \Sigma)` hides it and raises the loss.
    The sum :math:`\frac12 \mathrm{tr}(B \Sigma) + \frac{\lambda}{2} \mathrm{tr}(\Sigma_h \Sigma^{-1})` (nats times
    lambda in its second term) has its minimum where :math:`\Sigma B \Sigma = \lambda \Sigma_h`, that is, at
    :math:`\Sigma = B^{-1/2} (\lambda B^{1/2} \Sigma_h B^{1/2})^{1/2} B^{-1/2}`. For an error that is alike in all
    directions, :math:`\Sigma_h = \sigma_h^2 I`, this is :math:`\sqrt{\lambda} \sigma_h B^{-1/2}` (Golatkar et al.,
    arXiv 1911.04933), the form of `DiagonalNoise.optimal` and `KroneckerNoise.optimal`, and the minimum is
    :math:`\sqrt{\lambda} \sigma_h \mathrm{tr}(B^{1/2})`. It assumes that the loss is quadratic around the scrubbed
    weights.

    Args:
        curvature: B (d, d), symmetric positive definite: Hessian of the mean objective on the retained samples.
        residual: :math:`\Sigma_h` (d, d), symmetric positive semi-definite, in squared units of the weights.
        strength: lambda, what one nat may cost in loss.

    Returns:
        :math:`\Sigma` (d, d) in double precision.

    Raises:
        ValueError: The strength is not positive, the curvature not positive definite, or the residual has a negative
            eigenvalue.

    Example:
        >>> import torch
        >>> optimal_covariance(torch.tensor([[4.0]]), torch.tensor([[9.0]]), strength=1.0).round(decimals=9).tolist()
        [[1.5]]
    """
    if not strength > 0:
        raise ValueError(f"the strength of the information term must be positive, got {strength}")
    values, basis = torch.linalg.eigh(curvature.double())
    if not float(values[0]) > 0:
        raise ValueError(f"the curvature must be positive definite, its lowest eigenvalue is {float(values[0]):.4g}")
    root = (basis * values.sqrt()) @ basis.mT
    inverse_root = (basis * values.rsqrt()) @ basis.mT
    middle = strength * (root @ residual.double() @ root)
    inner, inner_basis = torch.linalg.eigh(0.5 * (middle + middle.mT))
    if float(inner[0]) < -1e-10 * float(inner.abs().max()):  # what rounding may leave of a zero
        raise ValueError(f"the residual must be positive semi-definite; its image under B has {float(inner[0]):.4g}")
    covariance = inverse_root @ ((inner_basis * inner.clamp_min(0).sqrt()) @ inner_basis.mT) @ inverse_root
    symmetric: Tensor = 0.5 * (covariance + covariance.mT)
    return symmetric
