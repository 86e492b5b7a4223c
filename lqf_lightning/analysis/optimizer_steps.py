"""What the optimizer of a run does at every step, written out before the first."""

import copy
import warnings
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from lqf_lightning.linear.training_rule import TrainingRule
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.schedule import scheduled_steps


@dataclass(frozen=True)
class StepGroup:
    """Parameters that are trained alike.

    Attributes:
        names: Their names in the network.
        factor: Factor of their learning rate.
        decay: What their gradient gets per unit of weight.
    """

    names: tuple[str, ...]
    factor: float
    decay: float


@dataclass(frozen=True)
class OptimizerSteps:
    """The steps of a run.

    Attributes:
        rule: Learning rates of groups with factor 1, and momentum.
        groups: The parameters that move.
        centered: Whether decay pulls towards the pre-trained weights; otherwise towards zero.
    """

    rule: TrainingRule
    groups: tuple[StepGroup, ...]
    centered: bool


def optimizer_steps(method: Method) -> OptimizerSteps:
    """Read optimizer and schedule of a run that is about to begin; nothing of them is changed.

    Args:
        method: The method, attached to a trainer with its optimizer.

    Returns:
        All steps of the run.

    Raises:
        ValueError: The optimizer is not plain stochastic gradient descent, no parameter moves, or the learning rates of
            groups are not in a fixed proportion.
    """
    (optimizer,) = method.trainer.optimizers
    refuse_optimizer(optimizer)
    rates = _scheduled_rates(method, optimizer)
    place = int(rates.max(0).values.argmax())
    leading = rates[:, place]
    if not float(leading.max()) > 0:
        raise ValueError(
            f"no parameter moves: all learning rates are 0. Set method.optimizer.lr, got {rates[0].tolist()}"
        )
    factors = rates[int(leading.argmax())] / leading.max()
    if not torch.allclose(rates, leading[:, None] * factors, rtol=1e-9, atol=0):
        raise ValueError(
            "the learning rates of layer groups are not in a fixed proportion: their training cannot be predicted. Set "
            "method/scheduler=cosine"
        )
    first = optimizer.param_groups[0]
    rule = TrainingRule(leading / _divisor(method), float(first["momentum"]), bool(first["nesterov"]))
    return OptimizerSteps(rule, _groups(method, optimizer, factors.tolist()), isinstance(method, LQF))


def refuse_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Check that an optimizer is stochastic gradient descent.

    Args:
        optimizer: That of a run.

    Raises:
        ValueError: It is another, or has options whose effect is not known.
    """
    if type(optimizer) is not torch.optim.SGD:
        raise ValueError(
            "training time is predicted for stochastic gradient descent, whose steps are linear in the gradient; got "
            f"{type(optimizer).__name__}. Set method/optimizer=sgd"
        )
    for group in optimizer.param_groups:
        if group["dampening"] or group["maximize"] or group["momentum"] != optimizer.param_groups[0]["momentum"]:
            raise ValueError(
                "training time is predicted for one momentum without dampening, got "
                f"momentum={group['momentum']}, dampening={group['dampening']} and maximize={group['maximize']}. Set "
                "method.optimizer.dampening=0 and method.optimizer.maximize=false"
            )


def _scheduled_rates(method: Method, optimizer: torch.optim.Optimizer) -> Tensor:
    # A copy of optimizer and schedule runs ahead; its parameters are empty.
    total, configs = scheduled_steps(method.trainer), method.trainer.lr_scheduler_configs
    empty = {
        id(p): torch.nn.Parameter(p.detach()[:0] * 0) for g in optimizer.param_groups for p in g["params"] if p.dim()
    }
    schedulers = [config.scheduler for config in configs]
    if any(config.interval != "step" or config.frequency != 1 or config.reduce_on_plateau for config in configs):
        raise ValueError("training time is predicted for schedules by steps. Set method/scheduler=cosine")
    ahead, copies = copy.deepcopy((optimizer, schedulers), cast(dict[int, Any], empty))
    rates = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # the copy has lost the note that its optimizer has taken steps
        for _ in range(total):
            rates.append([float(group["lr"]) for group in ahead.param_groups])
            ahead.step()
            for scheduler in copies:
                scheduler.step()
    return torch.tensor(rates, dtype=torch.float64)


def _divisor(method: Method) -> float:
    # What the method itself divides directions by, the penalty's included.
    return float(getattr(method.solver, "top_curvature", 1.0)) if isinstance(method, LQF) else 1.0


def _groups(method: Method, optimizer: torch.optim.Optimizer, factors: list[float]) -> tuple[StepGroup, ...]:
    known = {id(parameter): name for name, parameter in method.trained().items()}
    penalties = {n: method.ridge * f for n, f in method.penalty_weights().items()} if isinstance(method, LQF) else None
    found: dict[tuple[float, float], list[str]] = {}
    for group, factor in zip(optimizer.param_groups, factors, strict=True):
        for name in (known[id(parameter)] for parameter in group["params"]):
            decay = float(group["weight_decay"]) if penalties is None else penalties.get(name, 0.0)
            if factor > 0:
                found.setdefault((factor, decay), []).append(name)
    return tuple(StepGroup(tuple(names), *key) for key, names in found.items())
