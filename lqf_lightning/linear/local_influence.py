"""What a sample holds in place at weights that are already trained: influence to first order, not leave-one-out."""

from dataclasses import dataclass
from typing import TypeVar

import torch
from torch import Tensor

from lqf_lightning.linear.leave_one_out import Removable, RemovalGeometry
from lqf_lightning.linear.problem import QuadraticProblem

Cross = TypeVar("Cross")


@dataclass(frozen=True)
class LocalInfluence:
    r"""How trained weights would start to move if a sample lost its weight, for every sample.

    Attributes:
        weight_change: :math:`\lVert dw_i \rVert_M^2` (n,) of the first-order movement
            :math:`dw_i = -a_i H^{-1} J_i^T g_i`.
        self_influence: :math:`g_i^T h_i g_i` (n,), by how much the sample's own loss would rise, with the leverage
            :math:`h_i = a_i J_i H^{-1} J_i^T`. The ridge is in h alone.
        function_change: :math:`\lVert J_x dw_i \rVert^2` (n,), averaged over the other samples x; None if none were
            given.
    """

    weight_change: Tensor
    self_influence: Tensor
    function_change: Tensor | None


def local_influence(factor: Removable[Cross], gradient: Tensor, cross: Cross | None = None) -> LocalInfluence:
    r"""Move the weights by one influence function per sample, :math:`dw_i = w - w_{-i} \approx -a_i H^{-1} J_i^T g_i`.

    **Approximate, and not leave-one-out.** J are the Jacobians at the *current* weights, and
    :math:`H = \sum_i a_i J_i^T J_i + \lambda M` is the Gauss-Newton matrix of a squared loss there, whatever loss gave
    the gradients: the curvature of a cross-entropy, :math:`\mathrm{diag}(p) - p p^T`, is left out. The weights have
    seen every label, so samples that the network has memorized have small gradients, and seem to matter little. On a
    linear model at the optimum of a squared loss :math:`-g_i` is the ordinary residual, and the result is the
    derivative in the weight of the sample; leave-one-out amplifies it by :math:`(I - h_i)^{-1}`.

    Args:
        factor: The problem factored with a representation at the current weights, for its sample weights, ridge and
            intercept; targets, outputs and linear terms play no part.
        gradient: Derivatives g of each sample's loss with respect to its outputs (n, C), before its sample weight:
            `f - y` for the squared loss `1/2 |f - y|^2`, `p - y` for a cross-entropy.
        cross: Other samples, whose outputs are watched, in the form that the representation has.

    Returns:
        Changes for every sample; zeros for samples of weight 0.

    Raises:
        ValueError: The gradients have another shape than the outputs or are not finite.

    Example:
        >>> from lqf_lightning.linear.dual import DualFactor
        >>> from lqf_lightning.linear.kernel import Kernel
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.zeros(2, 1), ridge=2.0)
        >>> factor = DualFactor(problem, Kernel({"all": torch.ones(1, 2, 2)}, outputs=1))
        >>> result = local_influence(factor, torch.tensor([[4.0], [0.0]]))  # H = 1 + 1 + 2
        >>> [round(float(value), 9) for value in (result.weight_change[0], result.self_influence[0])]
        [1.0, 4.0]
    """
    problem = factor.problem
    if gradient.shape != problem.initial.shape:
        raise ValueError(f"expected gradients {tuple(problem.initial.shape)}, got {tuple(gradient.shape)}")
    if not bool(torch.isfinite(gradient).all()):
        raise ValueError("`gradient` holds values that are not finite; check the images and the network")
    return _collect(problem, factor.geometry(cross), gradient.double())


def _collect(problem: QuadraticProblem, geometry: RemovalGeometry, gradient: Tensor) -> LocalInfluence:
    inverse = geometry.inverse
    sides = gradient.reshape(*inverse.shape[:3], -1)
    scale = problem.root_weight.square()[:, 0]
    leverage = torch.eye(inverse.shape[2]).to(inverse) - problem.ridge * inverse
    function = geometry.function
    return LocalInfluence(
        weight_change=scale * _quadratic(geometry.weight, sides),
        self_influence=_quadratic(leverage, sides),
        function_change=None if function is None else scale * _quadratic(function, sides),
    )


def _quadratic(form: Tensor, sides: Tensor) -> Tensor:
    # Rounding may leave a form that should vanish slightly negative, never the change that it measures.
    return (sides * (form @ sides)).sum((1, 2, 3)).clamp_min(0.0)
