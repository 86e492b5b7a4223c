"""How much two Gaussian clouds of weights, or of answers, differ: what forgetting has left, in nats."""

import math
from collections.abc import Iterable

import torch
from torch import Tensor

from lqf_lightning.forgetting.noise import Noise


def gaussian_kl(change: Tensor, covariance: Tensor, reference: Tensor) -> float:
    r"""The Kullback-Leibler divergence of two Gaussians, in nats.

    For scrubbed weights :math:`N(h, \Sigma)` and retrained ones :math:`N(w', \Sigma_0)`, with d = h - w':
    :math:`\frac12 [d^T \Sigma_0^{-1} d + \mathrm{tr}(\Sigma_0^{-1} \Sigma) - D + \log\det\Sigma_0 - \log\det\Sigma]`.
    By the data processing inequality it bounds what any function of the weights tells (arXiv 1911.04933, proposition
    1). Published code for this bound leaves out the 1/2: its numbers are twice these. It assumes that the noise is
    Gaussian and that nothing else of the process, neither seed nor noiseless weights, is released.

    Args:
        change: d (D,).
        covariance: :math:`\Sigma` (D, D), or its diagonal (D,).
        reference: :math:`\Sigma_0` in the same form.

    Returns:
        Information in nats, 0 only for equal Gaussians.

    Raises:
        ValueError: The covariances have other shapes than (D, D) or (D,), or are not positive definite.

    Example:
        >>> import torch
        >>> one = torch.ones(1)
        >>> gaussian_kl(torch.tensor([2.0]), one, one)
        2.0
        >>> round(gaussian_kl(torch.zeros(1), 4 * one, one), 9)  # (4 - 1 - log 4) / 2
        0.806852819
    """
    size = change.numel()
    if covariance.shape != reference.shape or covariance.shape not in {(size,), (size, size)}:
        raise ValueError(
            f"expected two covariances of shape {(size,)} or {(size, size)}, got {tuple(covariance.shape)} and "
            f"{tuple(reference.shape)}"
        )
    change, covariance, reference = change.double().flatten(), covariance.double(), reference.double()
    if covariance.dim() == 1:
        _refuse_indefinite(covariance, "covariance")
        _refuse_indefinite(reference, "reference")
        ratios, scaled = covariance / reference, change / reference.sqrt()
    else:
        _refuse_indefinite(torch.linalg.eigvalsh(covariance), "covariance")
        _refuse_indefinite(torch.linalg.eigvalsh(reference), "reference")
        factor = torch.linalg.cholesky(reference)
        half = torch.linalg.solve_triangular(factor, covariance, upper=False)
        ratios = torch.linalg.eigvalsh(torch.linalg.solve_triangular(factor, half.mT, upper=False))
        scaled = torch.linalg.solve_triangular(factor, change[:, None], upper=False)
    excess = ratios - 1  # x - 1 - log x >= 0 term by term, without the cancellation of the four sums
    return 0.5 * float(scaled.square().sum() + (excess - torch.log1p(excess)).clamp_min(0).sum())


def certified_information(noise: Noise | None, distance: float, intercept_distance: float = 0.0) -> float:
    r"""What noisy weights tell at most, where no retrained model exists to compare with.

    A solver's certificate bounds how far the scrubbed weights are from the optimum on the retained samples, and an
    intercept has a bound of its own; together they are at most :math:`\sqrt{\delta^2 + \delta_b^2}` away. It assumes
    that the retrained model *is* that optimum, up to the same noise, and that its objective holds nothing else of the
    forgotten samples.

    Args:
        noise: The noise of weights and intercept; None for none, which hides no change at all.
        distance: Upper bound delta of the Euclidean distance of the weights from the retrained ones. A certificate in
            a metric M bounds the Euclidean distance after division by the square root of the lowest eigenvalue of M.
        intercept_distance: The same for an intercept that the distance does not include.

    Returns:
        Upper bound in nats; infinity without noise, unless the distance is 0.

    Raises:
        ValueError: A distance is negative or not a number.

    Example:
        >>> from lqf_lightning.forgetting.noise import IsotropicNoise
        >>> round(certified_information(IsotropicNoise(0.01), 0.003, 0.004), 9), certified_information(None, 0.003)
        (0.125, inf)
    """
    if not (distance >= 0 and intercept_distance >= 0):
        raise ValueError(f"bounds of distances must not be negative, got {distance} and {intercept_distance}")
    total = math.hypot(distance, intercept_distance)
    if noise is None:
        return math.inf if total else 0.0
    return noise.worst_information(total)


def query_information(change: Tensor, covariance: Tensor) -> float:
    r"""What the answers to some queries tell of a linear model with noisy weights, :math:`\frac12 c^T C^+ c` in nats.

    With noise :math:`N(0, \Sigma)` on the weights of both models, the answers to the queries are jointly Gaussian
    around `f` and differ by :math:`c = J d` with covariance :math:`C = J \Sigma J^T`. The result is never above the
    information in the weights, :math:`\frac12 d^T \Sigma^{-1} d`, and equal to it once J has full column rank. It
    assumes one draw of noise for all answers, and exact answers: rounded ones tell less. It is exact where the model is
    linear in its weights; for a network it holds to first order.

    Args:
        change: c (q,), one entry per output of a query.
        covariance: C (q, q), symmetric positive semi-definite, in the precision that it was computed in: queries whose
            answers follow from earlier ones are recognized by it.

    Returns:
        Information in nats; infinity if answers without noise of their own differ.

    Example:
        >>> import torch
        >>> query_information(torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([1.0, 4.0])))
        1.0
        >>> query_information(torch.tensor([1.0, 1.0]), torch.ones(2, 2))  # the same query twice
        0.5
    """
    return float(cumulative_query_information(change, covariance)[-1])


def cumulative_query_information(change: Tensor, covariance: Tensor) -> Tensor:
    r"""What the first 1, 2, ..., q answers tell, in nats: `query_information` for all leading parts at once.

    The rows of the Cholesky factor :math:`C = L L^T` take the queries one by one; :math:`\frac12 (L^{-1} c)_k^2` is
    what answer k adds to the earlier ones. Sums of *single* queries are no bound: joint answers can tell more than
    their sum.

    Args:
        change: c (q,).
        covariance: C (q, q), as in `query_information`.

    Returns:
        Information in nats (q,), non-decreasing.

    Raises:
        ValueError: There is no query, or the covariance is not (q, q).

    Example:
        >>> import torch
        >>> cumulative_query_information(torch.tensor([1.0, 2.0]), torch.diag(torch.tensor([1.0, 4.0]))).tolist()
        [0.5, 1.0]
    """
    count = change.numel()
    if count == 0 or covariance.shape != (count, count):
        raise ValueError(f"expected a covariance {(count, count)} of at least 1 query, got {tuple(covariance.shape)}")
    tolerance = 8 * count * torch.finfo(covariance.dtype).eps
    change, covariance = change.double().flatten(), covariance.double()
    factor, failed = torch.linalg.cholesky_ex(covariance)
    if int(failed) == 0 and bool((factor.diagonal().square() > tolerance * covariance.diagonal()).all()):
        steps = torch.linalg.solve_triangular(factor, change[:, None], upper=False)[:, 0]
    else:
        steps = _independent_steps(change, covariance, tolerance)
    total: Tensor = 0.5 * steps.square().cumsum(0)
    return total


def _independent_steps(change: Tensor, covariance: Tensor, tolerance: float) -> Tensor:
    # A Cholesky factor that leaves out rows that follow from earlier ones: they add nothing, or everything.
    count = len(change)
    factor, steps = torch.zeros_like(covariance), torch.zeros_like(change)
    kept: list[int] = []
    negligible = math.sqrt(tolerance) * float(change.abs().max())
    for k in range(count):
        before = factor[kept][:, kept]
        row = torch.linalg.solve_triangular(before, covariance[k, kept][:, None], upper=False)[:, 0]
        pivot, rest = covariance[k, k] - row.square().sum(), change[k] - row @ steps[kept]
        if float(pivot) <= tolerance * float(covariance[k, k]):
            steps[k] = math.inf if float(rest.abs()) > negligible else 0.0
            continue
        factor[k, kept], factor[k, k], steps[k] = row, pivot.sqrt(), rest / pivot.sqrt()
        kept.append(k)
    return steps


def seed_average(values: Iterable[float]) -> float:
    """The local forgetting bound: the mean of the information over training seeds, in nats.

    For every seed, both models start from the same weights and see the same order. The divergence between the mixtures
    over seeds is at most the mean of the divergences seed by seed (arXiv 1911.04933, proposition 2), by convexity. It
    assumes that the seeds are drawn independently of the forgotten samples.

    Args:
        values: Information per seed, in nats.

    Returns:
        Upper bound in nats for a model whose seed is not known.

    Raises:
        ValueError: There is no value, or one is negative or not a number.

    Example:
        >>> seed_average([0.1, 0.3])
        0.2
    """
    listed = list(values)
    if not listed or not all(value >= 0 for value in listed):
        raise ValueError(f"expected the information of at least one seed, none of it negative, got {listed}")
    return math.fsum(listed) / len(listed)


def _refuse_indefinite(eigenvalues: Tensor, name: str) -> None:
    if not bool((eigenvalues > 0).all()):
        raise ValueError(
            f"the {name} must be positive definite, its lowest eigenvalue is {float(eigenvalues.min()):.4g}"
        )
