r"""How far the intercept is from its optimum, given how far the weights are.

The intercept that is best for a movement is :math:`b(dw) = \sum_i a_i (y_i - f_{0,i} - J_i dw) / \sum_i a_i`, hence
:math:`|b(dw) - b^*| = |\bar J (dw - dw^*)| \le \lVert \bar J M^{-1/2} \rVert \, |dw - dw^*|_M` with the weighted mean
Jacobian :math:`\bar J` of the training samples.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from lqf_lightning.linear import Metric, QuadraticProblem
from lqf_lightning.linear.metric import dot


def mean_jacobian_of_kernel(problem: QuadraticProblem, matrix: Tensor) -> float:
    r"""The norm :math:`\lVert \bar J M^{-1/2} \rVert`, the root of the largest eigenvalue of the kernel's mean block.

    Args:
        problem: Has the sample weights.
        matrix: The full kernel `J M^-1 J^T` (n * C, n * C), rows by sample, then by output.

    Returns:
        The norm.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.zeros(2, 1), ridge=1.0)
        >>> rows = torch.tensor([[3.0], [5.0]], dtype=torch.float64)
        >>> round(mean_jacobian_of_kernel(problem, rows @ rows.T), 9)
        4.0
    """
    share = problem.root_weight.square() / problem.root_weight.square().sum()
    blocks = matrix.double().reshape(problem.samples, problem.outputs, problem.samples, problem.outputs)
    gram = torch.einsum("i,icjd,j->cd", share[:, 0].to(matrix.device), blocks, share[:, 0].to(matrix.device))
    return _root_of_largest(gram)


def mean_jacobian_by_pulls(
    problem: QuadraticProblem, metric: Metric, pull: Callable[..., list[dict[str, Tensor]]]
) -> float:
    """The same norm from one pass over the samples, with as many right-hand sides as there are outputs.

    Memory: as many gradients in double precision. Work: 1 evaluation of the convolutions and 2 per output.

    Args:
        problem: Has the sample weights.
        metric: M.
        pull: Applies `J^T` to right-hand sides (n, C), summed over ranks.

    Returns:
        The norm.
    """
    share = problem.root_weight.square() / problem.root_weight.square().sum()
    rows = pull(*(share * unit for unit in torch.eye(problem.outputs).to(share)))
    solved = [metric.solve(row) for row in rows]
    gram = torch.tensor([[dot(row, other) for other in solved] for row in rows], dtype=torch.float64)
    return _root_of_largest(gram)


def _root_of_largest(gram: Tensor) -> float:
    return float(torch.linalg.eigvalsh(0.5 * (gram + gram.mT))[-1].clamp_min(0.0).sqrt())
