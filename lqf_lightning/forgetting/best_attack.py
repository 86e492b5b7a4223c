"""What the best of all attacks can do against two noisy releases whose means are known."""

import math

import torch
from torch import Tensor

_RANK = 1e-12  # eigenvalues below this share of the largest are rounding


def best_attack_auc(distance: float, sigma: float) -> float:
    r"""Area under the curve of the best test between :math:`N(w_1, \sigma^2 I)` and :math:`N(w_2, \sigma^2 I)`.

    .. math:: AUC = \Phi\!\left(\frac{\lVert w_1 - w_2 \rVert}{\sigma \sqrt 2}\right)

    By Neyman and Pearson no attack on the released weights, nor on anything computed from them, tells the two models
    apart any better, also if it knows both means. It is the likelihood ratio test: projected on the line between
    the means, the releases are normal with variance sigma squared, and the difference of two has twice that.

    Args:
        distance: Euclidean distance of the weights before noise, or a bound on it.
        sigma: Standard deviation of the noise on every weight of both.

    Returns:
        0.5 (nothing can be told) to 1.

    Raises:
        ValueError: The distance is negative, or there is no noise.

    Example:
        >>> best_attack_auc(0.0, 0.1), round(best_attack_auc(0.1, 0.1), 4)
        (0.5, 0.7602)
    """
    if not 0 <= distance < math.inf:
        raise ValueError(f"a distance is finite and not negative, got {distance}")
    _refuse_sigma(sigma)
    return _normal(distance / sigma / math.sqrt(2))


def auc_of_information(nats: float) -> float:
    r"""The same for any two Gaussians of equal covariance, from the divergence between them.

    With :math:`KL = \frac12 \delta^T \Sigma^{-1} \delta` the best test has the area :math:`\Phi(\sqrt{KL})`, so that a
    bound in nats becomes a bound on attacks.

    Args:
        nats: The divergence, or a bound on it.

    Returns:
        0.5 to 1.

    Raises:
        ValueError: The divergence is negative.

    Example:
        >>> round(auc_of_information(0.5), 4), auc_of_information(0.0)  # one standard deviation apart
        (0.7602, 0.5)
    """
    if not nats >= 0:
        raise ValueError(f"a divergence is not negative, got {nats}")
    return _normal(math.sqrt(nats))


def best_query_attack_auc(change: Tensor, gram: Tensor, sigma: float) -> float:
    r"""Area under the curve of the best test that sees the answers of a noisy linear model to some queries only.

    The answers are normal with means that differ by :math:`\Delta f = J_Q \Delta w` and the covariance
    :math:`\sigma^2 J_Q J_Q^T`, hence

    .. math:: AUC = \Phi\!\left(\frac{1}{\sigma\sqrt2}\sqrt{\Delta f^T (J_Q J_Q^T)^+ \Delta f}\right)
        \le \Phi\!\left(\frac{\lVert \Delta w \rVert}{\sigma \sqrt 2}\right)

    with equality once :math:`\Delta w` is in the span of the rows of :math:`J_Q`. More queries never tell less.

    Args:
        change: Difference of the answers without noise (q,), queries times outputs flattened.
        gram: Inner products of their Jacobian rows, over all weights that carry noise (q, q).
        sigma: Standard deviation of the noise on every weight of both models.

    Returns:
        0.5 to 1; exactly 1 if an answer differs in a direction that the noise does not reach.

    Raises:
        ValueError: The shapes do not fit, or there is no noise.

    Example:
        >>> import torch
        >>> change, gram = torch.tensor([0.2, 0.0]), torch.tensor([[4.0, 0.0], [0.0, 1.0]])  # moves one weight by 0.1
        >>> round(best_query_attack_auc(change, gram, sigma=0.1), 4)
        0.7602
    """
    if change.ndim != 1 or gram.shape != (len(change), len(change)):
        raise ValueError(f"expected changes (q,) and their (q, q), got {tuple(change.shape)} and {tuple(gram.shape)}")
    _refuse_sigma(sigma)
    if not bool(change.any()):
        return 0.5
    values, vectors = torch.linalg.eigh(gram.double())
    parts = (vectors.mT @ change.double()).square()
    reached = values > _RANK * values.max().clamp_min(0)
    outside = float(parts[~reached].sum())
    if outside > 1e-6 * float(parts.sum()):  # more than the rounding of outputs
        return 1.0
    return best_attack_auc(math.sqrt(float((parts[reached] / values[reached]).sum())), sigma)


def single_query_attack_auc(change: Tensor, squared_rows: Tensor, sigma: float) -> Tensor:
    r"""The best attack that sees one answer, for every answer: :math:`\Phi(|\Delta f_q| / (\sigma \sqrt 2 |J_q|))`.

    Args:
        change: Difference of the answers without noise, of any shape.
        squared_rows: Squared lengths of their Jacobian rows, the diagonal of the kernel, of the same shape.
        sigma: Standard deviation of the noise on every weight of both models.

    Returns:
        Areas of the same shape, none above `best_attack_auc`; 1 where the noise does not reach a changed answer.

    Raises:
        ValueError: The shapes differ, or there is no noise.

    Example:
        >>> import torch
        >>> single_query_attack_auc(torch.tensor([0.0, 0.2]), torch.tensor([1.0, 4.0]), 0.1)
        tensor([0.5000, 0.7602], dtype=torch.float64)
    """
    if change.shape != squared_rows.shape:
        raise ValueError(f"expected one row per change, got {tuple(squared_rows.shape)} and {tuple(change.shape)}")
    _refuse_sigma(sigma)
    moved, length = change.double().abs(), sigma * (2 * squared_rows.double()).sqrt()
    area: Tensor = torch.special.ndtr(moved / length)
    return torch.where(moved == 0, torch.full_like(area, 0.5), area)


def _refuse_sigma(sigma: float) -> None:
    if not 0 < sigma < math.inf:
        raise ValueError(f"without noise every difference can be told; got sigma={sigma}. Set sigma=0.001")


def _normal(value: float) -> float:
    return 0.5 * math.erfc(-value / math.sqrt(2))
