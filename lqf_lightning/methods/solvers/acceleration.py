"""What makes conjugate gradients converge in few passes over the training samples."""

import logging
from typing import TYPE_CHECKING, Literal

from lqf_lightning.linear import DualPrecondition, Kernel, QuadraticProblem, current_reducer, sketch_rows
from lqf_lightning.methods.solvers.auto_ridge import kernel_scales, penalized_groups, surrogate_kernel
from lqf_lightning.methods.solvers.sketched_ridge import settle_ridge_by_sketch
from lqf_lightning.methods.solvers.training_images import TrainingImages
from lqf_lightning.methods.solvers.training_table import TrainingTable
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

Acceleration = Literal["auto", "trace", "sketch", "kfac", "none"]
log = logging.getLogger(__name__)
LEARNED_ROWS = 13_000  # up to which a learned penalty with a small ridge is sketched
_LARGE = 0.1  # of the kernel's mean diagonal: ridges with which a trace kernel does in a dozen iterations
_AUTOMATIC, SKETCH_LIMIT = 8_000, 20_000  # rows of the Jacobian, samples times classes
_WIDTH = 4  # columns of the sketch per row, less where memory is short
_NARROWEST = 2.0
_COPIES = 3  # of the sketch, while ranks exchange it


def choose_acceleration(method: "LQF", problem: QuadraticProblem) -> Literal["trace", "sketch", "kfac", "none"]:
    """Choose by size, and say why.

    Args:
        method: The method.
        problem: Its problem.

    Returns:
        What is used.

    Raises:
        ValueError: A sketch is asked for, and there is too little memory for it.
    """
    rows, wanted = problem.samples * problem.outputs, method.acceleration
    wide = _columns(method, rows) >= _NARROWEST * rows
    needed = _COPIES * 4 * _NARROWEST * rows**2 / 2**30
    if wanted == "sketch" and not wide:
        raise ValueError(
            f"a sketch of {rows} rows needs {needed:.2g} GiB, memory_gib={method.memory_gib}. Set method.memory_gib="
            f"{1.01 * needed:.2g}, or method.acceleration=kfac"
        )
    if wanted != "auto":
        return wanted
    other: Literal["kfac", "none"] = "none" if method.preconditioner is None else "kfac"
    if method.metric == "kfac":
        return other
    if method.metric == "learned":
        return _for_learned(method, problem, rows, wide, other)
    sketched = rows <= _AUTOMATIC and wide
    why = f"{problem.samples} samples x {problem.outputs} classes = {rows} rows, a sketch is for up to {_AUTOMATIC}"
    why += "" if wide else f", and takes {needed:.2g} GiB, more than method.memory_gib={method.memory_gib}"
    log.info("conjugate gradients are accelerated by %s: %s", "a sketch" if sketched else other, why)
    return "sketch" if sketched else other


def _for_learned(
    method: "LQF", problem: QuadraticProblem, rows: int, wide: bool, other: Literal["kfac", "none"]
) -> Literal["trace", "sketch", "kfac", "none"]:
    # Many outputs share weights in ways that a trace kernel does not know, and a sketch of them does not fit.
    kind: Literal["trace", "sketch", "kfac", "none"] = other
    if rows <= LEARNED_ROWS:
        large = method.relative_ridge >= _LARGE and problem.samples <= method.penalty_samples
        kind = "trace" if large else "sketch" if wide else other
    name = {"trace": "the trace kernel, which has chosen the penalty", "sketch": "a sketch"}.get(kind, kind)
    log.info(
        "conjugate gradients are accelerated by %s: %d samples x %d classes, a ridge of %.2g of the mean diagonal",
        name, problem.samples, problem.outputs, method.relative_ridge,
    )  # fmt: skip
    return kind


def sketch_inverse(
    method: "LQF", table: TrainingTable, problem: QuadraticProblem, *, refine: bool = False
) -> DualPrecondition:
    """Sketch the Jacobian of the training samples and factor what is like its kernel.

    Args:
        method: The method, attached to a trainer.
        table: Its training samples.
        problem: Its problem.
        refine: Whether a ridge that a surrogate has chosen in this run is chosen again, by the sketch.

    Returns:
        An approximate inverse of the dual system, the same on every rank; of another problem if the ridge changes.
    """
    rows = sketch_rows(
        method.linearized,
        penalized_groups(method),
        TrainingImages(method),
        _columns(method, problem.samples * problem.outputs),
        scales=kernel_scales(method),
        index=table.own_index,
        reducer=current_reducer(),
        watch=lambda batches: track(batches, "sketch of the Jacobian"),
    )
    if refine and method.learned_penalty is not None and method.matching is None:
        settle_ridge_by_sketch(method, table, rows)
        problem = table.problem(method)
    return DualPrecondition.of_rows(problem, rows)


def trace_inverse(
    method: "LQF", table: TrainingTable, problem: QuadraticProblem, kernel: Kernel | None
) -> DualPrecondition:
    """Factor the trace kernel, in which every output has a weight vector of its own: n x n for any number of classes.

    Args:
        method: The method, attached to a trainer, its penalty settled.
        table: Its training samples.
        problem: Its problem.
        kernel: The trace kernel by penalty group, if it is at hand; else it is assembled.

    Returns:
        An approximate inverse of the dual system, the same on every rank.
    """
    scales = kernel_scales(method)
    if kernel is not None:
        return DualPrecondition(problem, kernel, {group: scales[group] for group in kernel.groups})
    return DualPrecondition(problem, surrogate_kernel(method, table, scales=scales))


def _columns(method: "LQF", rows: int) -> int:
    return min(_WIDTH * rows, int(method.memory_gib * 2**30 / 4 / _COPIES / rows))
