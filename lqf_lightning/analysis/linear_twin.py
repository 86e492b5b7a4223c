"""The linear method whose problem stands for that of a run."""

import copy
import math
from functools import partial
from typing import cast

import torch

from lqf_lightning.backbones import Backbone
from lqf_lightning.methods import LQF, Finetune, Method
from lqf_lightning.methods.lqf_refusals import refuse_expansions


def linear_twin(method: Method, start: Backbone | None = None, *, intercept: bool = True) -> LQF:
    """An `lqf` method is its own twin; that of fine-tuning is the expansion of its network at the pre-trained weights.

    The twin of fine-tuning learns scaled one-hot targets by the squared loss, with the layers that train and
    batch-norm statistics frozen, whatever loss and statistics the run has: it is a model of the run, not the run. It
    trains nothing itself, and works with a copy.

    Args:
        method: The method, attached to a trainer.
        start: The network as it was before training; None: as it is now.
        intercept: Whether the bias of the head is free of penalty, and at its optimum whenever training stops; else it
            is a weight like the others. It plays no part for `lqf`.

    Returns:
        The method itself, or a new one that is attached to the same trainer; its ridge is then to be chosen by
        leave-one-out. Refusals are those of `refuse_method`.
    """
    if refuse_method(method):
        return cast(LQF, method)
    backbone = copy.deepcopy(start or method.backbone)
    with torch.random.fork_rng(devices=[]):  # the start-up probe draws images
        twin = LQF(
            backbone,
            method.classes,
            optimizer=partial(torch.optim.SGD, lr=1.0),
            target_scale=float(method.hparams["target_scale"]),
            ridge="auto",
            intercept=intercept,
            layers=method.layers,
            solver="kernel",
            normalize_step=False,
        )
    twin.trainer, twin.sample_weights = method.trainer, method.sample_weights
    return twin.to(method.device, next(method.parameters()).dtype)


def training_time(method: Method, steps: int, planned: int | None = None) -> float | None:
    """How long a run trains: the sum of its learning rates over its steps, those of momentum at their final effect.

    In the mean form of the loss; divided by the number of samples it is the time of gradient flow on the sum form.

    Args:
        method: The method.
        steps: Optimizer steps of the run.
        planned: Steps that its schedule is laid out over; None: as many.

    Returns:
        The time; None where the optimizer is not stochastic gradient descent, whose steps have other units.
    """
    parameter = torch.nn.Parameter(torch.zeros(()))  # rates and schedule are wanted, not a training
    optimizer = method.make_optimizer([{"params": [parameter], "name": "any"}])
    if type(optimizer) is not torch.optim.SGD:
        return None
    schedule = None if method.make_schedule is None else method.make_schedule(optimizer, planned or steps)
    rates = []
    parameter.grad = torch.zeros(())
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        if schedule is not None:
            schedule.step()
    return math.fsum(rates) / (1 - float(optimizer.param_groups[0]["momentum"]))


def refuse_method(method: Method) -> bool:
    """Check that a method has a linear-quadratic problem of samples and labels, its own or that of its twin.

    Args:
        method: The method.

    Returns:
        Whether the problem is its own.

    Raises:
        ValueError: It has none.
    """
    if isinstance(method, LQF):
        _refuse_lqf(method)
        return True
    if not isinstance(method, Finetune):
        raise ValueError(
            f"per-sample analysis needs a method that learns labels, lqf or finetune, got {type(method).__name__}. Set "
            "method=finetune, or leave the callback out"
        )
    return False


def _refuse_lqf(method: LQF) -> None:
    options = method.hparams
    if options["loss"] != "squared":
        raise ValueError(
            f"per-sample analysis of lqf is for the squared loss, got loss={options['loss']!r}. Set method.loss=squared"
        )
    if options["metric"] == "kfac":
        raise ValueError(
            "per-sample analysis works with a penalty by layer groups, got metric='kfac'. Set method.metric=identity, "
            "or learned"
        )
    refuse_expansions(method.relinearize, method.expansions, "numbers about single samples")
    if method.ridge == 0:
        raise ValueError("without a penalty the optimum is not unique: method.ridge=0. Set method.ridge=1e-3")
