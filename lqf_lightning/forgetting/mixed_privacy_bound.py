"""The bound on what a scrub by noisy gradient descent leaves of many requests."""

import math


def mixed_privacy_bound(
    steps: int,
    sigma: float,
    batch: int,
    fraction: float,
    dimension: int,
    *,
    c0: float,
    c1: float,
    c2: float,
    a: float,
    mu: float,
    beta: float,
) -> float:
    r"""What weights tell about all samples forgotten so far, however many requests there were, in nats.

    Theorem 1 of Golatkar et al. (arXiv 2012.13431, equation 14), for scrubs whose Newton step is found by stochastic
    gradient descent: :math:`\frac{\gamma^\tau c_0 (c_1 r^2 / \sigma^2 + d) + c_2 / (B \sigma^2)}
    {1 - (1 + a) \gamma^\tau}` with :math:`\gamma = 1 - \mu^2 / \beta^2`. It falls with steps, noise and batch and grows
    with the fraction and the dimension. It assumes a loss that is mu-strongly convex and beta-smooth, and the same
    noise at each request. The paper leaves the constants to its supplement, so only their user can say what a value
    means; the term with d does not vanish for any noise. For steps with a certificate, `certified_information` says
    more.

    Args:
        steps: tau, of descent per request.
        sigma: Standard deviation of the noise, in the unit of the weights.
        batch: B, samples per step.
        fraction: r, share of the samples that each request forgets.
        dimension: d, number of weights.
        c0: Positive constant of the theorem.
        c1: Positive constant of the theorem.
        c2: Positive constant of the theorem.
        a: Between 0 and :math:`\gamma^{-\tau} - 1`.
        mu: Strong convexity of the objective, at least its ridge in mean form.
        beta: Smoothness of the objective, at least mu.

    Returns:
        Information in nats.

    Raises:
        ValueError: An argument is outside its range; with few steps no a may be inside its.

    Example:
        >>> constants = {"c0": 1.0, "c1": 1.0, "c2": 1.0, "a": 0.5, "mu": 1.0, "beta": 1.0}  # gamma = 0
        >>> mixed_privacy_bound(1, 0.5, 4, 0.01, 100, **constants)
        1.0
    """
    positive = {"steps": steps, "sigma": sigma, "batch": batch, "dimension": dimension, "c0": c0, "c1": c1, "c2": c2}
    odd = {name: value for name, value in (positive | {"mu": mu}).items() if not 0 < value < math.inf}
    if odd:
        raise ValueError(f"expected positive and finite numbers, got {odd}")
    if not 0 < fraction <= 1:
        raise ValueError(f"the fraction that is forgotten must be above 0 and at most 1, got {fraction}")
    if not mu <= beta < math.inf:
        raise ValueError(f"smoothness is never below strong convexity, got beta={beta} and mu={mu}")
    ratio = (mu / beta) ** 2
    contraction = math.exp(steps * math.log1p(-ratio)) if ratio < 1 else 0.0
    if not (a > 0 and (1 + a) * contraction < 1):
        limit = math.expm1(-steps * math.log1p(-ratio)) if contraction > 1e-300 else math.inf
        raise ValueError(f"a must be above 0 and below {limit:.4g} for {steps} steps, got {a}: take more steps")
    memory = contraction * c0 * (c1 * fraction**2 / sigma**2 + dimension)
    return (memory + c2 / (batch * sigma**2)) / (1 - (1 + a) * contraction)
