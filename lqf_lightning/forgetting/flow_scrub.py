"""From weights that gradient flow has reached on all samples to those it would have reached on the retained ones."""

import math

import torch
from torch import Tensor


def flow_scrub(
    weights: Tensor,
    gradient: Tensor,
    retained_gradient: Tensor,
    curvature: Tensor,
    retained_curvature: Tensor,
    time: float,
    start: Tensor | None = None,
) -> Tensor:
    r"""The optimal scrub of a quadratic loss after a finite time of training.

    Training from :math:`w_0` for the time t leads to :math:`w = w_D + e^{-A t} (w_0 - w_D)`, with the optimum
    :math:`w_D = w - d` and :math:`d = A^{-1} \nabla L_D(w)`. The scrub retraces it and follows the retained samples
    instead: :math:`h(w) = w + e^{-B t} e^{A t} d + e^{-B t} (d_r - d) - d_r`, with
    :math:`d_r = B^{-1} \nabla L_{D_r}(w)` (Golatkar et al., arXiv 1911.04933, proposition 3, whose statement has the
    sign of the third term wrong and whose proof has it right). With growing time the start is forgotten and what stays
    is the Newton step, :math:`w - d_r`. It assumes the same initial weights and the same time for both trainings, and
    losses that are quadratic and strongly convex. The scrub has no information left (0 nats), as far as it is exact.

    Args:
        weights: w (D,), reached on all samples.
        gradient: :math:`\nabla L_D(w)` (D,), of the objective on all samples, penalty included.
        retained_gradient: :math:`\nabla L_{D_r}(w)` (D,).
        curvature: A (D, D), Hessian on all samples.
        retained_curvature: B (D, D), Hessian on the retained samples.
        time: :math:`t = \eta \tau`, learning rate times steps.
        start: :math:`w_0` (D,), if known. Without it, it is retraced, which amplifies the rounding of the weights by
            :math:`e^{A t}`; with it nothing is amplified, whatever the time.

    Returns:
        Scrubbed weights (D,) in double precision.

    Raises:
        ValueError: The time is negative or not finite, a Hessian is not positive definite, or retracing the start
            overflows.

    Example:
        >>> import torch
        >>> one, zero = torch.ones(1), torch.zeros(1)
        >>> flow_scrub(one, zero, one, one[:, None], 2 * one[:, None], time=100.0).tolist()  # the Newton step
        [0.5]
    """
    if not 0 <= time < math.inf:
        raise ValueError(f"the training time must be finite and not negative, got {time}")
    weights, gradient, retained_gradient = weights.double(), gradient.double(), retained_gradient.double()
    values, basis = _decompose(curvature, "curvature on all samples")
    retained_values, retained_basis = _decompose(retained_curvature, "curvature on the retained samples")
    retained_step = retained_basis @ ((retained_basis.mT @ retained_gradient) / retained_values)
    decay = torch.exp(-time * retained_values)
    if start is not None:
        apart = start.double() - weights + retained_step
        return weights - retained_step + retained_basis @ (decay * (retained_basis.mT @ apart))
    step = (basis.mT @ gradient) / values
    # e^{-Bt} e^{At} d with one exponent per pair of eigenvectors: e^{At} alone may be too large for a number.
    growth = time * (values[None, :] - retained_values[:, None]) + step.abs().log()
    turned = ((retained_basis.mT @ basis) * step.sign() * growth.exp()).sum(1)
    result = weights - retained_step + retained_basis @ turned
    result = result + retained_basis @ (decay * (retained_basis.mT @ (retained_step - basis @ step)))
    if not bool(result.isfinite().all()):
        raise ValueError(f"after the time {time:.4g} the start cannot be retraced from the weights: give `start`")
    return result


def _decompose(matrix: Tensor, name: str) -> tuple[Tensor, Tensor]:
    values, basis = torch.linalg.eigh(matrix.double())
    if not float(values[0]) > 0:
        raise ValueError(f"the {name} must be positive definite, its lowest eigenvalue is {float(values[0]):.4g}")
    return values, basis
