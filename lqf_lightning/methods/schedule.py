"""Learning-rate schedules over the whole run, in fractions of its steps."""

import math
from collections.abc import Sequence

from lightning import Trainer
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def cosine(optimizer: Optimizer, total_steps: int, *, warmup: float = 0.05) -> LambdaLR:
    """Linear warm-up, then half a cosine down to zero.

    Args:
        optimizer: Its learning rates are the peak values.
        total_steps: Optimizer steps of the whole run.
        warmup: Fraction of the steps spent rising from zero.

    Returns:
        A scheduler to be stepped after every optimizer step.
    """
    rise = _warmup_steps(total_steps, warmup)

    def factor(step: int) -> float:
        if step < rise:
            return (step + 1) / rise
        return 0.5 * (1 + math.cos(math.pi * (step - rise) / max(1, total_steps - rise)))

    return LambdaLR(optimizer, factor)


def multistep(
    optimizer: Optimizer,
    total_steps: int,
    *,
    warmup: float = 0.0,
    milestones: Sequence[float] = (0.5, 0.8),
    gamma: float = 0.1,
) -> LambdaLR:
    """Linear warm-up, then the rate is multiplied by `gamma` at each milestone.

    The default milestones are those of the tangent-model recipe (epochs 25 and 40 of 50; Liu and Soatto, ICCV 2023).

    Args:
        optimizer: Its learning rates are the initial values.
        total_steps: Optimizer steps of the whole run.
        warmup: Fraction of the steps spent rising from zero.
        milestones: Fractions of the run, in (0, 1).
        gamma: Factor at each milestone.

    Returns:
        A scheduler to be stepped after every optimizer step.

    Raises:
        ValueError: A milestone lies outside (0, 1).
    """
    if not all(0 < milestone < 1 for milestone in milestones):
        raise ValueError(
            f"`milestones` are fractions of the run in (0, 1), got {list(milestones)}. "
            "Set method.scheduler.milestones=[0.5,0.8]"
        )
    rise = _warmup_steps(total_steps, warmup)

    def factor(step: int) -> float:
        passed = sum(step / total_steps >= milestone for milestone in milestones)
        return min(1.0, (step + 1) / rise if rise else 1.0) * gamma**passed

    return LambdaLR(optimizer, factor)


def _warmup_steps(total_steps: int, warmup: float) -> int:
    if not 0 <= warmup < 1:
        raise ValueError(f"`warmup` is a fraction of the run in [0, 1), got {warmup}. Set method.scheduler.warmup=0.05")
    return round(warmup * total_steps)


def scheduled_steps(trainer: Trainer) -> int:
    """The number of steps that a schedule is laid out over.

    Args:
        trainer: The trainer of the run.

    Returns:
        Steps of the whole run.

    Raises:
        ValueError: It has no end.
    """
    steps = trainer.estimated_stepping_batches
    if steps == math.inf:
        raise ValueError(
            "a schedule is laid out over the steps of the whole run, which has no end: trainer.max_epochs=-1. Set "
            "trainer.max_epochs or +trainer.max_steps, or method.scheduler=null"
        )
    return int(steps)
