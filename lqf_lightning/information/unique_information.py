r"""How much the trained weights, or the function that they give, tell about one sample that no other sample tells.

The *smooth unique information* of sample i (Harutyunyan et al., Estimating informativeness of samples with smooth
unique information, ICLR 2021) is the divergence of the weights trained on all samples from those trained without it,
both smoothed by the same Gaussian noise: :math:`\mathrm{KL}(N(w, \Sigma) \,\Vert\, N(w_{-i}, \Sigma)) =
\frac12 (w - w_{-i})^T \Sigma^{-1} (w - w_{-i})` (eq. 5). The noise decides which changes count; this module has those
kinds for which the changes that leave-one-out returns are enough, `steady_state_information` has the noise that
stochastic gradient descent leaves in the weights. All values are in nats.
"""

import math

from torch import Tensor


def weight_information(change: Tensor, sigma: float = 1.0) -> Tensor:
    r"""Unique information in the weights under isotropic noise, :math:`\lVert dw - dw_{-i} \rVert^2 / (2 \sigma^2)`.

    Equation 5 of the paper with :math:`\Sigma = \sigma^2 I`, the identity being the metric of the penalty. Another
    sigma rescales all samples alike.

    Args:
        change: Squared changes of the weights (n,), `LeaveOneOut.weight_change` or that of training for a finite time.
        sigma: Standard deviation of the noise, in units of the weights.

    Returns:
        Nats (n,).

    Example:
        >>> import torch
        >>> weight_information(torch.tensor([0.0, 2.0, 8.0]), sigma=2.0).tolist()
        [0.0, 0.25, 1.0]
    """
    _refuse_unless_positive("sigma", sigma)
    return change / (2 * sigma**2)


def function_information(change: Tensor, sigma: float = 1.0) -> Tensor:
    r"""Unique information in the outputs on other inputs, :math:`E_x \lVert f - f_{-i} \rVert^2 / (2 \sigma^2)`.

    Equation 8 of the paper: the outputs, not the weights, are smoothed by noise of variance :math:`\sigma^2`. For a
    linearized network it is the information in the weights under :math:`\Sigma = \sigma^2 F^{-1}`, with the Fisher
    matrix :math:`F = E_x[J_x^T J_x]` (eq. 9). Other inputs need no labels.

    Args:
        change: Squared changes of the outputs (n,), averaged over other inputs: `LeaveOneOut.function_change` or that
            of training for a finite time.
        sigma: Standard deviation of the noise, in units of the outputs.

    Returns:
        Nats (n,).

    Example:
        >>> import torch
        >>> function_information(torch.tensor([0.0, 2.0, 8.0])).tolist()
        [0.0, 1.0, 4.0]
    """
    _refuse_unless_positive("sigma", sigma)
    return change / (2 * sigma**2)


def langevin_information(cook: Tensor, step: float, batch: int, noise: float) -> Tensor:
    r"""Unique information in weights that SGD with isotropic gradient noise leaves, a multiple of Cook's distance.

    Noise :math:`\Lambda = s^2 I` in the gradient keeps the weights at :math:`\Sigma = \frac{\eta s^2}{2b} H^{-1}`
    around the optimum, H being the Hessian of the objective; hence :math:`\frac{b}{\eta s^2} dw_i^T H dw_i` (section 4
    of the paper).

    Args:
        cook: :math:`dw_i^T H dw_i` (n,), `LeaveOneOut.cook`; the intercept, if there is one, is part of it.
        step: eta of the sum form; a learning rate h on the mean over n samples is h / n here.
        batch: Samples in a batch, b.
        noise: s, the standard deviation per direction of n times the gradient of one sample drawn by lot.

    Returns:
        Nats (n,).

    Example:
        >>> import torch
        >>> langevin_information(torch.tensor([0.0, 0.5]), step=0.25, batch=8, noise=2.0).tolist()
        [0.0, 4.0]
    """
    for name, value in (("step", step), ("batch", batch), ("noise", noise)):
        _refuse_unless_positive(name, value)
    return cook * (batch / (step * noise**2))


def _refuse_unless_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"`{name}` must be positive and finite, got {value}")
