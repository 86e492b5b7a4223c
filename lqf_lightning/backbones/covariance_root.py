"""The matrix square root of a covariance over places, smooth whatever its rank."""

import torch
from torch import Tensor

# Keeps the root of a map that is the same everywhere from being 0 / 0; variances of features are far above it.
_FLOOR = 1e-12


def covariance_root(maps: Tensor, iterations: int = 5) -> Tensor:
    r"""Take the square root of the covariance of vectors over places by Newton-Schulz iterations.

    With the centered vectors as columns of Z, over the root of their number, the covariance is :math:`A = Z Z^T`. From
    :math:`Y_0 = A / \mathrm{tr} A, X_0 = I` the coupled iteration

    .. math:: T = (3 I - X Y) / 2, \quad Y \leftarrow Y T, \quad X \leftarrow T X

    brings :math:`\sqrt{\mathrm{tr} A}\, Y` to :math:`A^{1/2}` (Li et al., "Towards Faster Training of Global
    Covariance Pooling Networks by Iterative Matrix Square Root Normalization", CVPR 2018, eqs. 4-7). A fixed number of
    iterations is a polynomial in A over its trace, with at most :math:`1.5^k` as derivative at an eigenvalue of zero,
    where the exact root has none: maps of 2 x 2 places, whose covariance has rank 3, need nothing else, and neither
    an eigendecomposition (whose derivative fails at equal eigenvalues) nor a ridge is involved. Where there are fewer
    places than channels, the same polynomial is taken of :math:`Z^T Z`, which is smaller.

    Args:
        maps: Vectors at M places (B, F, M).
        iterations: Number k. Eigenvalues below about :math:`2.25^{-k}` of the trace get less than their root.

    Returns:
        Symmetric roots (B, F, F).

    Raises:
        ValueError: If there are no two places, or no iteration.

    Example:
        >>> corners = torch.tensor([[[1.0, -1.0, 1.0, -1.0], [3.0, 3.0, -3.0, -3.0]]])
        >>> [[round(value, 3) for value in row] for row in covariance_root(corners, 9)[0].tolist()]
        [[1.0, 0.0], [0.0, 3.0]]
    """
    if maps.shape[-1] < 2:
        raise ValueError(f"got maps {tuple(maps.shape)}, expected at least two places: one has no covariance")
    if iterations < 1:
        raise ValueError(f"got iterations={iterations}, expected at least 1")
    centered = maps - maps.mean(-1, keepdim=True)
    trace = centered.square().sum((-2, -1), keepdim=True) / maps.shape[-1] + _FLOOR
    unit = centered / (maps.shape[-1] * trace).sqrt()
    if maps.shape[-1] < maps.shape[-2]:
        inverse, _ = _newton_schulz(unit.mT @ unit, iterations)
        return trace.sqrt() * (unit @ inverse @ unit.mT)
    _, root = _newton_schulz(unit @ unit.mT, iterations)
    return trace.sqrt() * root


def _newton_schulz(matrix: Tensor, iterations: int) -> tuple[Tensor, Tensor]:
    # Inverse root and root. The trace is at most one, so that all eigenvalues are in the range of convergence.
    identity = torch.eye(matrix.shape[-1], dtype=matrix.dtype, device=matrix.device)
    turn = (3 * identity - matrix) / 2
    inverse, root = turn, matrix @ turn
    for _ in range(iterations - 1):
        turn = (3 * identity - inverse @ root) / 2
        inverse, root = turn @ inverse, root @ turn
    return inverse, root
