"""Where training stands after some time, in closed form."""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.solution import Solution


def descend(spectrum: KernelSpectrum, step: float, steps: int) -> Solution:
    r"""The point that full-batch gradient descent from `dw = 0` has reached.

    Steps are :math:`dw \leftarrow dw - \eta M^{-1} \nabla` on the sum form of the objective, the intercept being at its
    optimum at all times. In the eigenvectors of the kernel the dual iterate is
    :math:`(1 - (1 - \eta x)^t) / x` with :math:`x = \kappa + \lambda`.

    Args:
        spectrum: The decomposed kernel.
        step: eta; a learning rate h on the mean over n samples is h / n here.
        steps: t.

    Returns:
        Coefficients, predictions and the distance from the optimum that is left.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.kernel import Kernel
        >>> from lqf_lightning.linear.problem import QuadraticProblem
        >>> problem = QuadraticProblem(torch.zeros(1, 1), torch.tensor([[8.0]]), ridge=1.0)
        >>> spectrum = KernelSpectrum(problem, Kernel({"all": torch.ones(1, 1, 1)}, outputs=1))
        >>> [round(float(descend(spectrum, 0.25, t).outputs), 9) for t in (0, 1, 2, 100)]  # dw += (8 - 2 dw) / 4
        [0.0, 2.0, 3.0, 4.0]
    """
    return spectrum.system.certify(spectrum.coefficients(descent_filter(spectrum, step, steps)))


def flow(spectrum: KernelSpectrum, time: float) -> Solution:
    r"""The point that gradient flow from `dw = 0` has reached, the limit of `descend` for small steps.

    Args:
        spectrum: The decomposed kernel.
        time: :math:`\tau = \eta t`, in the sum form of the objective.

    Returns:
        Coefficients, predictions and the distance from the optimum that is left.
    """
    return spectrum.system.certify(spectrum.coefficients(flow_filter(spectrum, time)))


def descent_filter(spectrum: KernelSpectrum, step: float, steps: int) -> Callable[[Tensor], Tensor]:
    r"""What descent makes of each eigenvector: :math:`(1 - (1 - \eta x)^t) / x` with :math:`x = \kappa + \lambda`.

    Args:
        spectrum: The decomposed kernel.
        step: eta.
        steps: t.

    Returns:
        The function of the eigenvalues kappa.

    Raises:
        ValueError: The step times the largest eigenvalue is not between 0 and 2, where descent on all samples or on
            some diverges; or the number of steps is negative.
    """
    ridge = spectrum.system.problem.ridge
    top = float(spectrum.values.max()) + ridge
    if steps < 0 or not 0 < step * top < 2:
        raise ValueError(
            f"descent needs a step between 0 and {2 / top:.4g}, 2 over the largest eigenvalue {top:.4g}, and a number "
            f"of steps that is not negative; got the step {step:.4g} and {steps} steps"
        )

    def progress(values: Tensor) -> Tensor:
        fraction = (values + ridge) * step
        slow = fraction < 0.5  # where the power is near 1 and would cancel
        exact = -torch.expm1(steps * torch.log1p(-torch.where(slow, fraction, 0.0)))
        return torch.where(slow, exact, 1 - (1 - fraction) ** steps) / (values + ridge)

    return progress


def flow_filter(spectrum: KernelSpectrum, time: float) -> Callable[[Tensor], Tensor]:
    r"""What gradient flow makes of each eigenvector: :math:`(1 - e^{-\tau x}) / x` with :math:`x = \kappa + \lambda`.

    Args:
        spectrum: The decomposed kernel.
        time: tau.

    Returns:
        The function of the eigenvalues kappa.

    Raises:
        ValueError: The time is negative or not finite.
    """
    if not 0 <= time < math.inf:
        raise ValueError(f"the training time must be finite and not negative, got {time}")
    ridge = spectrum.system.problem.ridge
    return lambda values: -torch.expm1(-time * (values + ridge)) / (values + ridge)
