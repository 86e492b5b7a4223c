"""The noise of gradients of single samples at the optimum."""

import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum


def mean_gradient_noise(factor: DualFactor | KernelSpectrum) -> float:
    r"""The variance of n times the gradient of one sample drawn by lot, per direction.

    That is the trace of the :math:`\Lambda` of `steady_state`, divided by as many directions as there are rows.

    Args:
        factor: The solved problem, or its eigenvectors.

    Returns:
        The variance. With an intercept its C directions count as well, in trace and number.

    Example:
        >>> from lqf_lightning.linear.problem import QuadraticProblem
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [5.0]]), ridge=2.0)
        >>> factor = DualFactor(problem, Kernel({"all": torch.ones(1, 2, 2)}, outputs=1))
        >>> # gradients 3/2 - 1 and 3/2 - 5, their mean -3/2: 2 (2^2 + 2^2) in 2 directions, one of which is null
        >>> round(mean_gradient_noise(factor), 9)
        8.0
    """
    system, pulls = factor.system, pulls_of_samples(factor)
    refuse_separate_weights(system.kernel)
    samples, outputs, intercept = system.problem.samples, system.problem.outputs, system.problem.intercept
    root = system.problem.root_weight
    blocks = system.matrix[0].reshape(samples, outputs, samples, outputs).diagonal(dim1=0, dim2=2).permute(2, 0, 1)
    force = root * pulls
    squares = (force * (blocks @ force.unsqueeze(2)).squeeze(2)).sum()
    whole = system.length(force) ** 2
    if intercept:  # whose pulls cancel at the optimum
        squares += force.square().sum()
    trace = int((root > 0).sum()) * float(squares) - whole
    return max(trace, 0.0) / ((samples + intercept) * outputs)


def pulls_of_samples(factor: DualFactor | KernelSpectrum) -> Tensor:
    r"""What each sample pulls its outputs towards at the optimum, against the ridge and the other samples.

    Minus the derivative of its data and linear term with respect to its outputs,
    :math:`a_i (y_i - f_i) - l_i = \lambda \beta_i`, divided by :math:`\sqrt{a_i}`: the gradient is minus the pull times
    the rows :math:`\sqrt{a_i} J_i`.

    Args:
        factor: The solved problem, or its eigenvectors.

    Returns:
        Pulls (n, C), zeros for samples of weight 0.

    Raises:
        ValueError: The solution has no coefficients.
    """
    problem = factor.system.problem
    if isinstance(factor, DualFactor):
        solution = factor.solution()
    else:
        solution = factor.system.certify(factor.coefficients(lambda values: 1 / (values + problem.ridge)))
    if solution.coefficients is None:
        raise ValueError("gradients of samples need a solution with coefficients")
    return torch.where(problem.root_weight > 0, problem.ridge * solution.coefficients / problem.root_weight, 0.0)


def refuse_separate_weights(kernel: Kernel) -> None:
    """Refuse kernels whose outputs have weights of their own, for which one gradient of one weight vector is not there.

    Args:
        kernel: Inner products among the training samples.

    Raises:
        ValueError: Its form is not full, and there are several outputs.
    """
    if kernel.coupled != kernel.outputs:
        raise ValueError(
            f"a kernel of form {kernel.form} belongs to one weight vector per output, for which SGD has no single "
            "steady state: assemble a kernel of form full"
        )
