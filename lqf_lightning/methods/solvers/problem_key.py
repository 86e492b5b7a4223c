"""Whether a checkpoint belongs to the same linear-quadratic problem as the run that goes on from it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lqf_lightning.linear import Metric, QuadraticProblem
from lqf_lightning.methods.solvers.training_table import TrainingTable

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

_ROUNDING = 1e-4  # relative, of outputs at w0 in single precision on another device


def problem_key(method: "LQF", table: TrainingTable, acceleration: str, metric: Metric) -> dict[str, Any]:
    """What a problem is made of, for `is_same_problem`.

    Args:
        method: The method, its ridge settled.
        table: Its training samples.
        acceleration: What preconditions the iteration.
        metric: That of the penalty.

    Returns:
        Tensors and plain values, for a checkpoint.
    """
    ones = {n: torch.ones_like(d) for n, d in method.linearized.deltas.items() if n != method.intercept_name}
    key = {
        "ridge": method.ridge,
        "target_scale": method.target_scale,
        "metric": method.metric,
        "acceleration": acceleration,
        "weights": method.penalty_weights(),
        "intercept": method.intercept_name,
        "preconditioner_samples": method.preconditioner_samples if method.metric == "kfac" else None,
        "index": table.index,
        "label": table.label,
        "metric_norm": torch.tensor(metric.squared_norm(ones), dtype=torch.float64),
        "initial": table.initial.norm(dim=1),
    }
    plain = table.reference is None and method.sample_weights is None
    return key if plain else key | _matched(table.problem(method, ridge=1.0))


def _matched(problem: QuadraticProblem) -> dict[str, Tensor]:
    # One number per sample tells targets apart, an exchange of classes included.
    pattern = torch.cos(torch.arange(problem.outputs, dtype=torch.float64)).to(problem.target.device)
    return {"weight": problem.root_weight.square().squeeze(1), "target": problem.target.double() @ pattern}


def is_same_problem(kept: Mapping[str, Any], now: Mapping[str, Any]) -> bool:
    """Compare two problems.

    Args:
        kept: Key from a checkpoint, empty if there is none.
        now: Key of the run.

    Returns:
        Whether they have the same samples, labels, outputs at the start, reference to match and penalty.
    """
    return kept.keys() == now.keys() and all(_agree(kept[name], value) for name, value in now.items())


def _agree(kept: Any, now: Any) -> bool:
    if not isinstance(now, Tensor):
        return bool(kept == now)
    if kept.shape != now.shape or not now.is_floating_point():
        return torch.equal(kept.to(now), now)
    return bool((kept.to(now) - now).norm() <= _ROUNDING * now.norm())
