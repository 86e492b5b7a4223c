"""The optimum of a run, and the optima that it would have without some of its samples."""

import time
from collections.abc import Mapping
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from lqf_lightning.analysis.run_problem import RunProblem
from lqf_lightning.linear import (
    Certificate,
    DualPrecondition,
    Metric,
    QuadraticProblem,
    Solution,
    StreamedJacobian,
    current_reducer,
    ridge_of_mean,
    solve_cg,
)
from lqf_lightning.linear.dual_system import DualSystem
from lqf_lightning.linear.predict_scrub import ScrubForecast, predict_scrub
from lqf_lightning.methods import LQF
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.methods.solvers.training_table import TrainingTable
from lqf_lightning.progress import track

NOTHING = "nothing"  # the cohort without samples, whose optimum is that of the run
_ENOUGH, _STEPS = 1e-6, 3  # relative gradient that will do, and steps that make up for the kernel's rounding
_BUDGET = 12 * 2**30


@dataclass(frozen=True)
class CohortOptimum:
    """Where training on the samples outside a cohort ends.

    Attributes:
        positions: The cohort, rows of the training table (s,).
        weights: dw by the names of the trained parameters, the intercept included.
        certificate: How far dw is from the optimum, intercept aside, from the true gradient of the model.
        solution: The same with coefficients and outputs.
        scrub: What getting here from the optimum on all samples takes; None for the cohort without samples.
    """

    positions: Tensor
    weights: dict[str, Tensor]
    certificate: Certificate
    solution: Solution
    scrub: ScrubForecast | None = None


def cohort_optima(
    run: RunProblem, cohorts: Mapping[str, Tensor], *, tolerance: float, max_steps: int = 1000
) -> dict[str, CohortOptimum]:
    r"""Solve the problem of a run with all samples, and again without each cohort.

    The strength mu of the mean form stays what it is, so that without s of n samples the ridge of the sum form is
    :math:`(n - s) \mu`: these are the optima that the same options find on the samples that stay. Each takes a
    factorization of the kernel and a few sweeps over the training samples, in which the kernel's rounding is made up
    for, so that certificates are those of the model itself.

    Args:
        run: The problem, with its full kernel; all ranks have to call this together.
        cohorts: Rows of the training table by name of the cohort (s,).
        tolerance: Relative gradient at which the scrub stops that is foretold.
        max_steps: Steps after which the forecast gives up.

    Returns:
        Optima by name, that of `NOTHING` first; the same on every rank.
    """
    found = {NOTHING: _optimum(run, run.table.index.new_zeros(0))}
    # Those of the kernel: residuals over the ridge, which a solver in weight space gives, miss dw by |g| / ridge.
    start = cast(Tensor, run.factor().solution().coefficients)
    system = DualSystem(run.problem, run.kernel, run.scales, copies=1, budget=_BUDGET)
    for name, positions in track(list(cohorts.items()), "optima without cohorts"):
        scrub = predict_scrub(system, without(run, positions), start, tolerance=tolerance, max_steps=max_steps)
        found[name] = _optimum(run, positions, scrub)
    return found


def without(run: RunProblem, positions: Tensor) -> QuadraticProblem:
    """The problem of a run without some samples, which stay in it with the weight 0.

    Args:
        run: The problem with all samples.
        positions: Rows of the training table (s,).

    Returns:
        The problem, its ridge that of the samples that stay.
    """
    weight = run.problem.root_weight.square().squeeze(1).index_fill(0, positions, 0.0)
    kept = run.problem.samples - len(positions)
    return run.problem.with_(weight=weight, ridge=ridge_of_mean(run.method.ridge, kept))


def seconds_of_sweep(method: LQF, table: TrainingTable, direction: Mapping[str, Tensor]) -> float:
    """Measure how long applying J to all training samples takes, reading images included.

    Args:
        method: The method, attached to a trainer.
        table: Its training samples.
        direction: Movement by parameter name.

    Returns:
        Seconds, those of the slowest rank.
    """
    begun = time.perf_counter()
    if len(table.own_index):
        StreamedJacobian(method.linearized, TrainingImages(method)).push(direction)[0].sum().item()
    taken = torch.zeros(current_reducer().world_size, dtype=torch.float64, device=method.device)
    taken[current_reducer().rank] = time.perf_counter() - begun
    return float(current_reducer().sum_(taken).max())


def _optimum(run: RunProblem, positions: Tensor, scrub: ScrubForecast | None = None) -> CohortOptimum:
    method, table = run.method, run.table
    names = [] if method.intercept_name is None else [method.intercept_name]
    (solution,) = solve_cg(
        [without(run, positions)],
        StreamedJacobian(method.linearized, TrainingImages(method)),
        tolerance=_ENOUGH,
        max_steps=_STEPS,
        exclude=names,
        metric=Metric(method.penalty_weights()),
        approximate_inverse=lambda problem: DualPrecondition(problem, run.kernel, run.scales),
        positions=table.shard.positions,
        reducer=current_reducer(),
    )
    moved = dict(solution.direction or {}) | dict.fromkeys(names, solution.intercept)
    deltas = method.linearized.deltas
    weights = {name: moved[name].detach().to(delta) for name, delta in deltas.items()}
    return CohortOptimum(positions, weights, solution.certificate, solution, scrub)
