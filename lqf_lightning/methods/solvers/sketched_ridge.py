"""The ridge of the model itself, where a surrogate has chosen the penalty and a sketch of the Jacobian is at hand."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lqf_lightning.linear import Kernel, current_reducer, mean_of_ridge, restrict_problem, ridge_of_mean
from lqf_lightning.linear.learned_penalty import LearnedPenalty, learn_penalty
from lqf_lightning.methods.leaking_start import judged_samples
from lqf_lightning.methods.solvers.training_table import TrainingTable
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_ROWS = 4_000  # of the sketch that leave-one-out is evaluated on, a few seconds each time
_STEPS = 10


def settle_ridge_by_sketch(method: "LQF", table: TrainingTable, rows: Tensor) -> None:
    """Choose the ridge again, by the leave-one-out cross-entropy of the model itself.

    Outputs of the network share weights, which a trace kernel does not see: with the surrogate's ridge the model may
    overfit. The inner products of sketched rows stand for the exact kernel at the factors that were learned; they err
    by a few percent. A part of the images is enough for one number.

    Args:
        method: The method, its penalty learned in this run; its ridge changes.
        table: Its training samples.
        rows: Sketches of their Jacobian (n, C, D), with the factors.
    """
    before = cast(LearnedPenalty, method.learned_penalty)
    samples, outputs = rows.shape[:2]
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    part = order[: max(2, _ROWS // outputs)].sort().values.to(rows.device)
    flat = rows[part].flatten(0, 1)
    kernel = Kernel({"sketch": (flat @ flat.T).unsqueeze(0)}, outputs)
    data = cast(Any, method.solver.data_module())
    index = table.index[part.to(table.index.device)]
    start = replace(before, scales={"sketch": 1.0}, share={"sketch": 1.0}, ridge=ridge_of_mean(method.ridge, samples))
    try:
        found = learn_penalty(
            restrict_problem(table.labels(method, ridge=1.0), part),
            kernel,
            start=start,
            steps=_STEPS,
            judged=judged_samples(data, index),
            together=data.together(index) if hasattr(data, "together") else None,
            watch=lambda steps: track(steps, "ridge of the model itself"),
        )
    except ValueError as error:  # too few images per class
        log.warning("the ridge stays that of the surrogate, as %d images cannot judge another: %s", len(part), error)
        return
    settled = torch.tensor([mean_of_ridge(found.ridge, samples)], dtype=torch.float64, device=method.device)
    old, method.ridge = method.ridge, float(current_reducer().broadcast_(settled))
    method.relative_ridge *= method.ridge / old
    log.info(
        "leave-one-out accuracy of the model itself, on %d images by a sketch: %.3f at the surrogate's ridge=%.4g, "
        "%.3f at ridge=%.4g", len(part), float(found.accuracy[0]), old, float(found.accuracy[found.step]), method.ridge,
    )  # fmt: skip
