"""The exact optimum by conjugate gradients: one Lightning epoch is one iteration."""

import logging
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import (
    CoefficientDescent,
    ConjugateGradient,
    CurvatureSolver,
    DualPrecondition,
    Kernel,
    KroneckerMetric,
    Metric,
    QuadraticProblem,
)
from lqf_lightning.methods.solvers.acceleration import (
    SKETCH_LIMIT,
    choose_acceleration,
    sketch_inverse,
    trace_inverse,
)
from lqf_lightning.methods.solvers.curvature_samples import fit_preconditioner
from lqf_lightning.methods.solvers.exact_solver import ExactSolver
from lqf_lightning.methods.solvers.problem_key import is_same_problem, problem_key
from lqf_lightning.methods.solvers.relinearize import arrive
from lqf_lightning.methods.solvers.settle_penalty import settle_penalty
from lqf_lightning.methods.solvers.sweep import PullSweep, PushSweep

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_DAMPING = 10.0  # times the ridge: after twenty iterations nearer to the optimum than with the ridge itself
Tensors = dict[str, Tensor]


class ConjugateGradients(ExactSolver):
    """Each epoch applies J to the search direction, then its transpose to the residual that follows (two sweeps).

    So checkpoints, resumption, validation and logging are the ordinary ones. Logged beside them: the relative norm of
    the gradient and the bound on the distance from the optimum that follows from it (see `Certificate`), and the
    objective in sum form. The run stops when the first is at or below the method's `tolerance`.

    Args:
        method: The method that is trained.

    Attributes:
        descent: The iteration, from `start` on.
    """

    name, sweeps = "cg", 2

    def __init__(self, method: "LQF") -> None:
        super().__init__(method)
        self.descent: ConjugateGradient
        self._push: PushSweep
        self._pull: PullSweep
        self._outputs: Tensor
        self._metric: Metric
        self._precondition: CurvatureSolver | None = None
        self._inverse: DualPrecondition | None = None
        self._done = 0

    def start(self) -> None:
        """Evaluate the network, fit the preconditioner, and take the first gradient or go on from a checkpoint."""
        super().start()
        method = self.method
        settled = not math.isnan(method.ridge)
        surrogate = settle_penalty(method, self.table)
        kind = self._accelerate(self.table.problem(method), surrogate, refine=not settled)
        problem = self.table.problem(method)  # a sketch may have chosen another ridge
        moved = {n: d.detach().clone() for n, d in method.linearized.deltas.items() if n != method.intercept_name}
        self._key = problem_key(method, self.table, kind, self._metric)
        kept, self._kept = self._kept, {}
        if is_same_problem(kept.get("problem", {}), self._key):
            self.descent = self._descent(problem, _zeros(moved))
            self._resume(kept)
        else:
            if "problem" in kept:
                log.warning("samples, targets, penalty or acceleration have changed: conjugate gradients start anew")
            self.descent = self._begin(problem, moved)
        self.certificate = self.descent.certificate

    @property
    def most_rows(self) -> int | None:
        """Most samples times classes that can be sketched, if a sketch is asked for."""
        return SKETCH_LIMIT if self.method.acceleration == "sketch" else None

    def _descent(self, problem: QuadraticProblem, start: Tensors, **options: Any) -> ConjugateGradient:
        if self._inverse is not None:
            return CoefficientDescent(problem, start, self._inverse, metric=self._metric)
        return ConjugateGradient(problem, start, metric=self._metric, precondition=self._precondition, **options)

    def _accelerate(self, problem: QuadraticProblem, surrogate: Kernel | None, *, refine: bool) -> str:
        method = self.method
        kind = choose_acceleration(method, problem)
        self._metric, self._inverse, self._precondition = Metric(method.penalty_weights()), None, None
        if kind == "sketch":
            self._inverse = sketch_inverse(method, self.table, problem, refine=refine)
        if kind == "trace":
            self._inverse = trace_inverse(method, self.table, problem, surrogate)
        kfac = fit_preconditioner(method, intercept=method.intercept_name) if kind == "kfac" else None
        if kfac is None:
            return kind
        if method.metric == "kfac":
            self._metric = KroneckerMetric(kfac, method.ridge)
        self._precondition = self._metric.curvature_solver(kfac, problem.samples, problem.ridge, _DAMPING)
        return kind

    def _begin(self, problem: QuadraticProblem, moved: Tensors) -> ConjugateGradient:
        descent = self._descent(problem, _zeros(moved))
        descent.receive_sides(*self.whole_pull(descent, "gradient at the pre-trained weights"))
        if not any(bool(entry.any()) for entry in moved.values()):
            return descent
        if self._inverse is not None:  # it acts on coefficients, which only movements from zero have
            log.warning(
                "with a sketch or a trace kernel, conjugate gradients start at the pre-trained weights; dw is dropped"
            )
            return descent
        image = self.whole_push(moved, "outputs of the present weights")
        reference = descent.reference  # certificates are relative to w0
        descent = self._descent(problem, moved, image=image, reference=reference)
        descent.receive_sides(*self.whole_pull(descent, "gradient at the present weights"))
        return descent

    def take(self, batch: Batch, sweep: int, position: int) -> dict[str, Tensor] | None:
        """Push the search direction through the batch, or pull the residual back through it.

        Args:
            batch: Samples of this rank, possibly none.
            sweep: 0 to push, 1 to pull.
            position: Number of the batch in the sweep.

        Returns:
            Loss and outputs after the step, in the second sweep.
        """
        method, descent, shard = self.method, self.descent, self.table.shard
        if position == 0:
            self._done = 0
        rows = slice(self._done, self._done + len(batch.target))
        self._done = rows.stop
        self.table.check_order(batch.index, rows)
        if sweep == 0:
            if position == 0:
                self._push = PushSweep(method.linearized, descent.direction)
            self._push.take(batch.input)
            return None
        if position == 0:
            descent.receive_image(self.spread(self._push))
            self._pull = self.pull_sweep(descent)
            self._outputs = descent.outputs[shard.positions]
        self._pull.take(batch.input)
        if position + 1 == self.batches_per_sweep:
            descent.receive_sides(*self.summed(self._pull))
            self.place(descent.movement, descent.intercept)
            self.report(descent.certificate)
        return method.note_training(self._outputs[rows].to(batch.input.dtype), batch)

    def end_epoch(self) -> None:
        """Stop when the certificate is good enough, or go on around the optimum."""
        if self.certificate is not None and self.certificate.relative_gradient <= self.method.tolerance:
            arrive(self.method, self.start)

    def state(self) -> dict[str, Any]:
        """The iteration, and the problem that it belongs to.

        Returns:
            Tensors and plain values.
        """
        where = super().state()
        if self.certificate is None:
            return where
        return where | {"descent": self.descent.state(), "image": self.descent.image, "problem": self._key}

    def _resume(self, kept: Mapping[str, Any]) -> None:
        device = self.method.device
        moved = {
            name: {key: entry.to(device) for key, entry in value.items()} if isinstance(value, Mapping) else value
            for name, value in kept["descent"].items()
        }
        self.descent.restore(moved, kept["image"].to(device))
        arrived = self.descent.certificate.relative_gradient <= self.method.tolerance
        if arrived and self.method.expansions >= self.method.relinearize:
            self.method.trainer.should_stop = True


def _zeros(tensors: Tensors) -> Tensors:
    return {name: torch.zeros_like(entry) for name, entry in tensors.items()}
