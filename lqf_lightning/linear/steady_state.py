"""The noise that stochastic gradient descent leaves in the weights, and what a sample tells through it."""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.dual_system import DualSystem
from lqf_lightning.linear.gradient_noise import mean_gradient_noise, pulls_of_samples, refuse_separate_weights
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.leave_one_out import LeaveOneOut, refuse_undefined_removals

ISOTROPIC_SHARE = 0.1  # of the mean gradient noise per direction: small beside it, large beside rounding
_NULL = 1e-12  # eigenvalues of the kernel below this share of the largest move no output
_FAINTEST = 1e-9  # isotropic noise beside the strongest direction's, at which five digits are left
_CHUNK = 2**23  # numbers in the movements that are looked at together, 64 MiB
_COPIES = 6  # eigenvectors, rows, covariance, its factor, and two of workspace


@dataclass(frozen=True)
class SteadyState:
    r"""The stationary distribution of SGD around the optimum, as far as training samples move weights and intercept.

    The optimum is followed in r orthonormal directions, eigenvectors of the Hessian
    :math:`H = \sum_i a_i J_i^T J_i + \lambda M` (bordered by the intercept, if there is one). In all others gradients
    are zero, no removal moves anything, and the noise is that of `isotropic` alone.

    Attributes:
        system: Problem and kernel.
        curvature: Eigenvalues of H (r,), ascending.
        rows: :math:`\sqrt{a_i} J_i` in these directions (n, C, r); columns of the intercept are part of them.
        covariance: :math:`\Sigma` (r, r), of the weights and the intercept in the same directions.
    """

    system: DualSystem
    curvature: Tensor
    rows: Tensor
    covariance: Tensor

    @cached_property
    def lower(self) -> Tensor:
        """Cholesky factor of the covariance (r, r)."""
        result: Tensor = torch.linalg.cholesky(self.covariance)
        return result

    def information(self, result: LeaveOneOut) -> Tensor:
        r"""The divergence :math:`\frac12 dw_i^T \Sigma^{-1} dw_i`, intercept included, of every removal.

        Args:
            result: Removals from the same problem, with the same labels: the noise depends on them.

        Returns:
            Nats (n,).

        Raises:
            ValueError: The result is of another number of samples or outputs.
        """
        problem, parts = self.system.problem, []
        if result.residual.shape != problem.initial.shape:
            raise ValueError(
                f"expected residuals {tuple(problem.initial.shape)}, got {tuple(result.residual.shape)}: removals and "
                "steady state must be of the same problem"
            )
        root = problem.root_weight
        linear = torch.where(root > 0, problem.linear_terms / root, 0.0)
        driving = torch.where(root > 0, root * result.residual - linear, 0.0)
        step = max(1, _CHUNK // max(1, self.rows[0].numel()))
        for rows, sides in zip(torch.split(self.rows, step), torch.split(driving, step), strict=True):
            moves = torch.einsum("nc,ncr->rn", sides, rows) / self.curvature[:, None]
            parts.append(0.5 * torch.linalg.solve_triangular(self.lower, moves, upper=False).square().sum(0))
        return torch.cat(parts)


def steady_state_information(
    factor: DualFactor | KernelSpectrum,
    result: LeaveOneOut,
    step: float,
    batch: int,
    isotropic: float | None = None,
) -> Tensor:
    r"""Unique information of every sample in weights that SGD has left where its own noise keeps them.

    Equations 13 and 14 of Harutyunyan et al. (Estimating informativeness of samples with smooth unique information,
    ICLR 2021) in terms of the kernel: :math:`\frac12 dw_i^T \Sigma^{-1} dw_i` with the covariance of `steady_state`.
    The covariance is taken not to change with one sample. Scores are proportional to b / eta; only `isotropic` changes
    their order, which for large values is that of `langevin_information`.

    Args:
        factor: The solved problem, or its eigenvectors, which save a decomposition where there is no intercept.
        result: Leave-one-out of the same problem, with the same labels.
        step: eta of the sum form; a learning rate h on the mean over n samples is h / n here.
        batch: Samples in a batch, b.
        isotropic: See `steady_state`.

    Returns:
        Nats (n,).

    Example:
        >>> from lqf_lightning.linear.kernel import Kernel
        >>> from lqf_lightning.linear.leave_one_out import leave_one_out
        >>> from lqf_lightning.linear.problem import QuadraticProblem
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [5.0]]), ridge=2.0)
        >>> factor = DualFactor(problem, Kernel({"all": torch.ones(1, 2, 2)}, outputs=1))
        >>> # dw = 6/4; without each sample 5/3 and 1/3; H = 4; noise (3.5 + 0.5)^2 + 8, times step / (2 H batch)
        >>> [round(float(v), 6) for v in 162 * steady_state_information(factor, leave_one_out(factor), 0.1, 2, 8.0)]
        [15.0, 735.0]
    """
    return steady_state(factor, step, batch, isotropic).information(result)


def steady_state(
    factor: DualFactor | KernelSpectrum,
    step: float,
    batch: int,
    isotropic: float | None = None,
    *,
    budget: int = 12 * 2**30,
) -> SteadyState:
    r"""Solve :math:`H \Sigma + \Sigma H = \frac\eta b (\Lambda + s I)` in the eigenvectors of the kernel.

    :math:`\Lambda = n \sum_i (g_i - \bar g)(g_i - \bar g)^T` is n^2 times the covariance of the gradients
    :math:`g_i = J_i^T (a_i (f_i - y_i) + l_i)` at the optimum, those of n samples of positive weight that are drawn
    with replacement (without replacement within a batch it is (n - b) / (n - 1) times that); the ridge adds no noise.
    Weights are measured in the metric of the penalty, the steps taken in its preconditioner. With an intercept, SGD is
    taken to move it with the same step; it is one more direction per output. Costs N^3 once and N^2 per sample for
    N = n C.

    Args:
        factor: The solved problem, or its eigenvectors, which save a decomposition where there is no intercept.
        step: eta of the sum form; a learning rate h on the mean over n samples is h / n here.
        batch: Samples in a batch, b.
        isotropic: s, positive: the variance per direction of further gradient noise. Gradients of n samples span less
            than n of N directions, and where there is no noise information is infinite. None means a tenth of
            `mean_gradient_noise`.
        budget: Bytes that the matrices may take; the default is enough for N = 16,000.

    Returns:
        The stationary distribution, the limit of that of SGD for small steps.

    Raises:
        ValueError: The kernel has no single set of weights, the batch or the noise is not positive, the noise is
            too small for double precision, SGD diverges with the step, or the matrices exceed the budget.
    """
    system = factor.system
    _refuse(system, batch, budget)
    isotropic = ISOTROPIC_SHARE * mean_gradient_noise(factor) if isotropic is None else isotropic
    if not 0 < isotropic < float("inf"):
        raise ValueError(
            f"`isotropic` must be positive and finite, got {isotropic}: samples fitted without any residual make no "
            "gradient noise, and information is infinite where there is none"
        )
    rows, curvature = _directions(factor)
    top = float(curvature.max()) if len(curvature) else system.problem.ridge
    if not 0 < step * top < 2:
        raise ValueError(
            f"SGD settles with no step but one between 0 and {2 / top:.4g}, 2 over the largest eigenvalue {top:.4g} of "
            f"the sum form; got {step:.4g}. A learning rate h on the mean over n samples is the step h / n"
        )
    noise = _noise(factor, rows, isotropic)
    covariance = noise.mul_(step / batch).div_(curvature[:, None] + curvature)
    return SteadyState(system, curvature, rows, covariance)


def _noise(factor: DualFactor | KernelSpectrum, rows: Tensor, isotropic: float) -> Tensor:
    # Lambda + s I (r, r), in the directions of the rows.
    present = factor.system.problem.root_weight[:, 0] > 0
    pulls = torch.einsum("nc,ncr->nr", pulls_of_samples(factor), rows)[present]
    pulls -= pulls.mean(0)
    noise = len(pulls) * (pulls.T @ pulls)
    faintest = _FAINTEST * float(noise.diagonal().max()) if len(noise) else 0.0
    if isotropic < faintest:
        raise ValueError(
            f"`isotropic` is {isotropic:.3g}, which double precision cannot tell from none beside the noise of the "
            f"samples: take {faintest:.3g} or more; a tenth of `mean_gradient_noise` is the default"
        )
    noise.diagonal().add_(isotropic)
    return noise


def _directions(factor: DualFactor | KernelSpectrum) -> tuple[Tensor, Tensor]:
    # Rows (n, C, r) and eigenvalues (r,) of the Hessian, weights and intercept together.
    system = factor.system
    problem = system.problem
    if isinstance(factor, KernelSpectrum) and not problem.intercept:
        values, vectors = factor.values[0], factor.vectors[0]
    else:
        values, vectors = torch.linalg.eigh(system.weighted()[0])
    kept = values > _NULL * values.max()
    values, rows = values[kept], vectors[:, kept]
    rows *= values.sqrt()
    curvature = values + problem.ridge
    if problem.intercept:
        rows = torch.cat([rows, system.columns], 1)
        hessian = rows.T @ rows
        hessian.diagonal()[: len(values)].add_(problem.ridge)
        curvature, turn = torch.linalg.eigh(hessian)
        rows = rows @ turn
    return rows.reshape(problem.samples, problem.outputs, -1), curvature


def _refuse(system: DualSystem, batch: int, budget: int) -> None:
    needed = _COPIES * 8 * len(system.root) ** 2
    refuse_undefined_removals(system.problem)
    refuse_separate_weights(system.kernel)
    if batch < 1:
        raise ValueError(f"a batch has 1 sample or more, got {batch}")
    if needed > budget:
        raise ValueError(
            f"the steady state of {len(system.root)} rows needs {needed / 2**30:.1f} GiB in double precision, the "
            f"budget is {budget / 2**30:.1f} GiB. Take fewer samples, or raise `budget`"
        )
