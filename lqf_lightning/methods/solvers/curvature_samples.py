"""The training samples that curvature is estimated from, before the first step."""

from collections.abc import Iterator
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Subset

from lqf_lightning.linear import KFAC, current_reducer
from lqf_lightning.methods.solvers.training_table import on_device
from lqf_lightning.progress import track

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

_CHUNK = 32  # samples in flight


def curvature_samples(method: "LQF", count: int | None, start: int = 0) -> Iterator[Tensor]:
    """This rank's share of random training samples, as they are evaluated: files are often sorted by class.

    Args:
        method: The method, attached to a trainer.
        count: Number of samples of all ranks; None means all.
        start: Where in the random order they begin.

    Yields:
        Inputs (B, 3, H, W).
    """
    loader = method.solver.data_module().fixed_train_dataloader()
    order = torch.randperm(len(loader.dataset), generator=torch.Generator().manual_seed(0))[start:][:count]
    own = order[method.trainer.global_rank :: method.trainer.world_size].tolist()
    batches = DataLoader(
        Subset(loader.dataset, own), _CHUNK, collate_fn=loader.collate_fn, num_workers=loader.num_workers
    )
    for batch in track(batches, "samples for the preconditioner", total=len(batches)):
        yield on_device(method, batch).input


def fit_preconditioner(method: "LQF", *, intercept: str | None = None) -> KFAC | None:
    """Fit the Kronecker factors that the method asks for.

    Args:
        method: The method, attached to a trainer, its ridge settled.
        intercept: Name of the bias that is eliminated, if one is.

    Returns:
        The preconditioner, or None if the method wants none.
    """
    if method.preconditioner is None:
        return None
    options = {} if intercept is None else {"intercept": intercept}
    return method.preconditioner(
        method.linearized,
        None,
        curvature_samples(method, method.preconditioner_samples),
        damping=method.ridge,
        reducer=current_reducer(),
        watch=partial(track, description="Kronecker factors: inverses"),
        **options,
    )
