"""What every single sample contributed to training that stopped early."""

import cmath
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.finite_time import descent_filter, flow_filter
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.leave_one_out import refuse_undefined_removals
from lqf_lightning.linear.solution import Solution

_CHUNK = 2**22  # numbers in the coefficients of the runs that are followed together, 32 MiB
Watch = Callable[[Sequence[int]], Iterable[int]]


@dataclass(frozen=True)
class FiniteLeaveOneOut:
    r"""Training without sample i for the same time, for every i; rows as in `LeaveOneOut`.

    Attributes:
        residual: :math:`y_i - f_{-i,t}(x_i)` (n, C).
        prediction: :math:`f_{-i,t}(x_i)` (n, C).
        weight_change: :math:`\lVert dw_t - dw_{-i,t} \rVert_M^2` (n,).
        intercept_change: :math:`b_t - b_{-i,t}` (n, C).
        function_change: Squared change of the outputs on other samples, averaged over them (n,); None if none were
            given.
    """

    residual: Tensor
    prediction: Tensor
    weight_change: Tensor
    intercept_change: Tensor
    function_change: Tensor | None


def leave_one_out_descent(
    spectrum: KernelSpectrum, step: float, steps: int, *, cross: Kernel | None = None, watch: Watch = iter
) -> FiniteLeaveOneOut:
    r"""Full-batch gradient descent without every sample in turn, all runs at once.

    The run without sample i is that of the dual iterate whose block i is held at 0; with an intercept, its part along
    the constant of the other samples is taken out as well, which is what fitting the intercept anew at every step
    amounts to. The cost is `2 t N^2 n` operations; `leave_one_out_flow` does not depend on t.

    Args:
        spectrum: The decomposed kernel.
        step: eta, see `descend`.
        steps: t.
        cross: Kernel with the rows of other samples and the columns of the training samples, whose outputs are watched.
        watch: Wraps the first positions of the chunks of samples, to report progress.

    Returns:
        See there.
    """
    progress, ridge = descent_filter(spectrum, step, steps), spectrum.system.problem.ridge
    matrix, reached = spectrum.system.weighted(), spectrum.dual(progress).unsqueeze(2)

    def change(samples: Tensor) -> Tensor:
        runs = torch.zeros_like(reached).repeat(1, 1, len(samples), 1)
        for _ in range(steps):
            pull = spectrum.sides.unsqueeze(2) - (matrix @ runs.flatten(2)).view_as(runs) - ridge * runs
            runs += step * _without(spectrum, pull, samples)
        return reached - runs

    return _collect(spectrum, spectrum.system.certify(spectrum.coefficients(progress)), change, cross, watch)


def leave_one_out_flow(
    spectrum: KernelSpectrum, time: float, *, nodes: int = 32, cross: Kernel | None = None, watch: Watch = iter
) -> FiniteLeaveOneOut:
    r"""Gradient flow without every sample in turn, at a cost that does not depend on the time.

    The dual iterate is a sum of resolvents over a contour,
    :math:`\varphi_\tau(S) r \approx -2 \tau\,\mathrm{Re} \sum_j (c_j / z_j) R_j r` with
    :math:`R_j = (z_j I + \tau S)^{-1}` (Trefethen, Weideman and Schmelzer, Talbot quadratures and rational
    approximations, 2006), and the removal of sample i from a resolvent is the block identity
    :math:`R_j r - (R_j)_{:i} (R_j)_{ii}^{-1} (R_j r)_i`.

    Args:
        spectrum: The decomposed kernel.
        time: :math:`\tau`, see `flow`.
        nodes: Of the contour, even, conjugates included: 24 give an error of 2e-12, 32 of 2e-13 of the movement.
        cross: Kernel with the rows of other samples and the columns of the training samples, whose outputs are watched.
        watch: Wraps the first positions of the chunks of samples, to report progress.

    Returns:
        See there.

    Raises:
        ValueError: The number of nodes is odd or not positive.
    """
    if nodes < 2 or nodes % 2:
        raise ValueError(f"the contour needs an even number of nodes, got {nodes}")
    system, progress = spectrum.system, flow_filter(spectrum, time)
    rates = time * (spectrum.values + system.problem.ridge)
    rows = spectrum.vectors.reshape(len(rates), system.problem.samples, system.kernel.coupled, -1)

    def change(samples: Tensor) -> Tensor:
        own = rows[:, samples]
        total = own.new_zeros(*own.shape[:2], own.shape[3], spectrum.sides.shape[2])
        for z, weight in _contour(nodes):
            scaled = own / (z + rates)[:, None, None]
            at_sample = (scaled.flatten(1, 2) @ spectrum.projected.to(scaled)).reshape(*own.shape[:3], -1)
            driving = torch.linalg.solve(scaled @ own.mT.to(scaled), at_sample)
            total -= 2 * time * (weight / z * (scaled.mT @ driving)).real
        changed: Tensor = spectrum.vectors @ total.transpose(1, 2).flatten(2)
        return changed.reshape(len(rates), -1, len(samples), total.shape[3])

    return _collect(spectrum, system.certify(spectrum.coefficients(progress)), change, cross, watch)


def _contour(nodes: int) -> list[tuple[complex, complex]]:
    # Nodes z in the upper half plane, and their weights (i / Q) exp(z) dz/dtheta.
    result = []
    for index in range(1, nodes, 2):
        theta = math.pi * index / nodes
        cotangent = 1 / math.tan(0.6407 * theta)
        z = nodes * (0.5017 * theta * cotangent - 0.6122 + 0.2645j * theta)
        slope = nodes * (0.5017 * (cotangent - 0.6407 * theta * (1 + cotangent**2)) + 0.2645j)
        result.append((z, 1j / nodes * cmath.exp(z) * slope))
    return result


def _without(spectrum: KernelSpectrum, runs: Tensor, samples: Tensor) -> Tensor:
    # Project run j of (b, N, k, s) on what the problem without samples[j] can reach.
    system = spectrum.system
    blocks = runs.view(len(runs), system.problem.samples, system.kernel.coupled, *runs.shape[2:])
    mine = torch.arange(len(samples), device=samples.device)
    blocks[:, samples, :, mine] = 0
    if not system.problem.intercept:
        return runs
    root = system.problem.root_weight[:, 0]
    rest = root.square().sum() - root[samples].square()
    level = torch.einsum("n,bncks->bcks", root, blocks) / rest[:, None]
    blocks -= root[:, None, None, None] * level.unsqueeze(1)
    blocks[:, samples, :, mine] = 0
    return runs


def _collect(
    spectrum: KernelSpectrum, state: Solution, change: Callable[[Tensor], Tensor], cross: Kernel | None, watch: Watch
) -> FiniteLeaveOneOut:
    system, problem = spectrum.system, spectrum.system.problem
    refuse_undefined_removals(problem)
    matrix = None if cross is None else system.cross_matrix(cross)
    rows = max(len(system.root), 0 if matrix is None else matrix.shape[1])
    wide = len(spectrum.sides) * max(system.kernel.coupled, spectrum.sides.shape[2])
    step = max(1, _CHUNK // (rows * wide))
    parts = []
    for start in watch(range(0, problem.samples, step)):
        samples = torch.arange(start, min(start + step, problem.samples), device=state.outputs.device)
        moved = (system.root[:, None] * change(samples)).flatten(2)
        parts.append(_effects(spectrum, state, samples, moved, matrix))
    prediction, weight, intercept, function = (torch.cat(column) for column in zip(*parts, strict=True))
    return FiniteLeaveOneOut(
        residual=problem.target.double() - prediction,
        prediction=prediction,
        weight_change=weight.clamp_min(0.0),
        intercept_change=intercept,
        function_change=None if cross is None else function,
    )


def _effects(
    spectrum: KernelSpectrum, state: Solution, samples: Tensor, moved: Tensor, matrix: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # What the changes of coefficients (b, N, k * s), one by removed sample, do to weights and outputs.
    system, problem = spectrum.system, spectrum.system.problem
    explained = system.matrix @ moved
    weight = (moved * explained).sum((0, 1)).reshape(len(samples), -1).sum(1)
    outputs = _by_run(explained, len(samples), problem.samples)
    intercept = torch.zeros_like(outputs[:, 0])
    if problem.intercept:
        intercept = _intercept_change(spectrum, state, samples, outputs)
    prediction = state.outputs[samples] - _own(outputs, samples) - intercept
    function = torch.zeros_like(weight)
    if matrix is not None:
        others = _by_run(matrix @ moved, len(samples), matrix.shape[1] // system.kernel.coupled)
        function = (others + intercept.unsqueeze(1)).square().sum(2).mean(1)
    return prediction, weight, intercept, function


def _intercept_change(spectrum: KernelSpectrum, state: Solution, samples: Tensor, outputs: Tensor) -> Tensor:
    # The intercept without a sample is the weighted mean of what the others leave open, linear terms included.
    problem = spectrum.system.problem
    weight = problem.root_weight.square()
    left = weight * (problem.target.double() - state.outputs) - problem.linear_terms
    drawn = left.sum(0) - left[samples] + (weight * outputs).sum(1) - weight[samples] * _own(outputs, samples)
    return -drawn / (weight.sum() - weight[samples])


def _own(outputs: Tensor, samples: Tensor) -> Tensor:
    return outputs[torch.arange(len(samples), device=samples.device), samples]


def _by_run(sides: Tensor, runs: int, samples: int) -> Tensor:
    # (b, n * c, k * s) to the outputs of each run (k, n, C)
    own = sides.reshape(len(sides), samples, -1, runs, sides.shape[2] // runs)
    return own.permute(3, 1, 0, 2, 4).flatten(2)
