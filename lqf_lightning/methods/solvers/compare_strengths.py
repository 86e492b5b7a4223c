"""What other strengths of matching would have given, from the kernel of a run."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lqf_lightning.congruence.tradeoff import TradeoffCurve, strengths, tradeoff_curve
from lqf_lightning.linear import Kernel
from lqf_lightning.methods.solvers.training_table import TrainingTable
from lqf_lightning.methods.solvers.validation_table import ValidationTable
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF


def compare_strengths(
    method: "LQF",
    table: TrainingTable,
    watched: ValidationTable,
    kernels: tuple[Kernel, Kernel],
    scales: Mapping[str, float] | None,
) -> TradeoffCurve | None:
    """Solve for all combinations of the method's `tradeoff`, at its ridge.

    Args:
        method: The method, its ridge settled.
        table: Its training samples.
        watched: Its validation samples.
        kernels: The kernel among the first, and that of the second with them.
        scales: What its groups are multiplied with; None: nothing.

    Returns:
        The curve, by the kernel as it is stored; None if there is nothing to compare.
    """
    matching = watched.matching
    if matching.tradeoff is None or table.reference is None:
        return None
    return tradeoff_curve(
        matching.problem(table.labels(method), table.reference, table.label),
        *kernels,
        watched.samples,
        strengths(matching.tradeoff["alpha"], matching.tradeoff["beta"]),
        scales=scales,
        watch=lambda points: track(points, "strengths of matching"),
    )
