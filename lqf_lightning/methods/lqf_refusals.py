"""Options of LQF that cannot be met, told before anything is computed."""

import math
from collections.abc import Callable
from typing import Any

from lightning import Trainer
from lightning.pytorch.strategies import DDPStrategy, SingleDeviceStrategy, Strategy
from torch.optim import Optimizer

from lqf_lightning.linear import KFAC

_PRECISIONS = ("32-true", "64-true")
_FINEST = 1e-6  # relative gradient that rounding allows in the first


def refuse_options(options: Any, preconditioner: Callable[..., KFAC] | None) -> None:
    """Check the options of `LQF` alone and against each other.

    Args:
        options: Its hyper-parameters.
        preconditioner: Its preconditioner.

    Raises:
        ValueError: An option is out of range, or two do not go together.
    """
    ridge, exact = options.ridge, options.solver != "sgd"
    if options.solver not in ("auto", "sgd", "cg", "kernel"):
        raise ValueError(f"`solver` must be auto, sgd, cg or kernel, got {options.solver!r}. Set method.solver=auto")
    if isinstance(ridge, str) and ridge != "auto":
        raise ValueError(f"`ridge` must be a number or auto, got {ridge!r}. Set method.ridge=auto")
    if not isinstance(ridge, str) and not 0 <= ridge < math.inf:
        raise ValueError(f"`ridge` must be at least 0 and finite, got {ridge}. Set method.ridge=1e-3")
    if ridge == 0 and exact:
        raise ValueError(f"solver={options.solver} needs a positive `ridge`, got {ridge}. Set method.ridge=1e-3")
    if options.loss != "squared" and (exact or ridge == "auto"):
        raise ValueError(
            f"solver={options.solver} with ridge={ridge} is for the squared loss, got loss={options.loss!r}. Set "
            "method.loss=squared, or method.solver=sgd and a number for method.ridge"
        )
    factors = dict(options.group_ridge or {})
    if not all(0 < factor < math.inf for factor in factors.values()):
        raise ValueError(f"factors must be positive and finite, got {factors}. Set method.group_ridge={{stem: 10}}")
    _refuse_metric(options, preconditioner)
    _refuse_acceleration(options, preconditioner)
    _refuse_sizes(options)


def _refuse_metric(options: Any, preconditioner: Callable[..., KFAC] | None) -> None:
    if options.metric not in ("identity", "learned", "kfac"):
        raise ValueError(
            f"`metric` must be identity, learned or kfac, got {options.metric!r}. Set method.metric=identity"
        )
    if options.metric == "learned" and (options.solver == "sgd" or options.ridge != "auto" or options.group_ridge):
        raise ValueError(
            "metric=learned finds the ridge and a factor for every block, for solver=auto, cg or kernel; got solver="
            f"{options.solver}, ridge={options.ridge}, group_ridge={options.group_ridge}. Set method.ridge=auto and "
            "method.group_ridge=null, or method.metric=identity"
        )
    if options.penalty_by not in ("stage", "block"):
        raise ValueError(
            f"`penalty_by` must be stage or block, got {options.penalty_by!r}. Set method.penalty_by=stage"
        )
    if options.metric != "kfac":
        return
    if options.solver != "cg" or options.group_ridge or preconditioner is None or options.ridge == "auto":
        raise ValueError(
            "metric=kfac is for solver=cg with a preconditioner, a number for `ridge` and no `group_ridge`; got "
            f"solver={options.solver}, preconditioner={'none' if preconditioner is None else 'one'}, "
            f"ridge={options.ridge}, group_ridge={options.group_ridge}. Set method.metric=identity"
        )


def _refuse_acceleration(options: Any, preconditioner: Callable[..., KFAC] | None) -> None:
    kind = options.acceleration
    if kind not in ("auto", "trace", "sketch", "kfac", "none"):
        raise ValueError(
            f"`acceleration` must be auto, trace, sketch, kfac or none, got {kind!r}. Set method.acceleration=auto"
        )
    if kind == "kfac" and preconditioner is None:
        raise ValueError("acceleration=kfac needs a preconditioner, got none. Set method/preconditioner=kfac")
    if options.metric == "kfac" and kind not in ("auto", "kfac"):
        raise ValueError(f"metric=kfac goes with acceleration=kfac, got {kind!r}. Set method.acceleration=kfac")


def _refuse_sizes(options: Any) -> None:
    if options.preconditioner_samples is not None and options.preconditioner_samples < 1:
        raise ValueError(
            f"`preconditioner_samples` must be null (all) or at least 1, got {options.preconditioner_samples}. "
            "Set method.preconditioner_samples=1000"
        )
    if options.penalty_samples < 2:
        raise ValueError(
            f"`penalty_samples` must be at least 2, got {options.penalty_samples}. Set method.penalty_samples=2000"
        )
    if options.relinearize < 0 or (options.relinearize and options.solver == "sgd"):
        raise ValueError(
            f"`relinearize` must be 0 or, with an exact solver, more; got {options.relinearize} with solver="
            f"{options.solver}. Set method.relinearize=0, or method.solver=auto"
        )
    for name, example in (("tolerance", "1e-3"), ("memory_gib", "4")):
        if not 0 < options[name] < math.inf:
            raise ValueError(f"`{name}` must be positive and finite, got {options[name]}. Set method.{name}={example}")


def refuse_trainer(trainer: Trainer, solver: str, tolerance: float, double: bool) -> None:
    """Check that a trainer goes through all samples, in a precision that a certificate means something in.

    Args:
        trainer: The trainer.
        solver: Name of the solver.
        tolerance: Relative gradient that is to be reached.
        double: Whether the weights are in double precision already.

    Raises:
        ValueError: It does not.
    """
    limit = trainer.limit_train_batches
    if isinstance(limit, int) or limit != 1.0:  # 1 is one batch, 1.0 all
        raise ValueError(
            f"solver={solver} goes through all training samples, but the trainer takes limit_train_batches={limit}. "
            "Set trainer.limit_train_batches=1.0, without trainer.overfit_batches and trainer.fast_dev_run; for fewer "
            "samples, set data.subset_ratio"
        )
    if trainer.precision not in _PRECISIONS:
        raise ValueError(
            f"solver={solver} certifies its result, which takes one of the precisions {_PRECISIONS}, got "
            f"{trainer.precision!r}. Set trainer.precision=32-true"
        )
    if tolerance < _FINEST and not double and trainer.precision == "32-true":
        raise ValueError(
            f"tolerance={tolerance} is beyond what single precision can certify, about {_FINEST:.0e}. Set "
            "trainer.precision=64-true, or method.tolerance=1e-6"
        )
    if solver == "kernel" and max(trainer.min_epochs or 1, trainer.min_steps or 1) > 1:
        raise ValueError(
            f"solver=kernel takes one step, got min_epochs={trainer.min_epochs} and min_steps={trainer.min_steps}. Set "
            "trainer.min_epochs=1 and trainer.min_steps=null"
        )


def refuse_expansions(relinearize: int, expansions: int, what: str) -> None:
    """Check that the weights that a network is expanded around have not been trained.

    Args:
        relinearize: How often the network is to be expanded anew.
        expansions: How often it has been.
        what: What would be wrong, as the subject of a sentence in the plural.

    Raises:
        ValueError: It was expanded anew, around weights that have seen the labels.
    """
    if relinearize or expansions:
        raise ValueError(
            f"{what} hold for a network that is expanded around weights that have seen no label, but with relinearize="
            f"{relinearize} ({expansions} times so far) these take part in the training. Train with "
            "method.relinearize=0, or leave them out"
        )


def refuse_other_solver(stored: str | None, solver: str) -> None:
    """Check that a run goes on with the solver that it began with.

    Args:
        stored: Solver of the checkpoint to go on from, None without one.
        solver: That of the method.

    Raises:
        ValueError: They differ.
    """
    if stored not in (None, solver):
        raise ValueError(
            f"the checkpoint was written with solver={stored}, which cannot go on with solver={solver}. Set "
            f"method.solver={stored}, or ckpt_path=null to start over"
        )


def refuse_strategy(strategy: Strategy) -> None:
    """Check how the model is distributed.

    Args:
        strategy: That of the trainer.

    Raises:
        TypeError: It divides the model itself, which forward-mode differentiation does not allow.
    """
    if not isinstance(strategy, (SingleDeviceStrategy, DDPStrategy)):
        raise TypeError(f"lqf runs on one device or under DDP, got {type(strategy).__name__}. Set trainer.strategy=ddp")


def refuse_weight_decay(optimizer: Optimizer) -> None:
    """Check that the penalty is what the method says.

    Args:
        optimizer: The optimizer of the method.

    Raises:
        ValueError: It decays weights by itself.
    """
    decay = {group.get("weight_decay", 0) for group in optimizer.param_groups}
    if decay != {0}:
        raise ValueError(
            f"lqf penalizes dw through `ridge`, before the preconditioner; got an optimizer with weight_decay {decay}. "
            "Set method.optimizer.weight_decay=0 and method.ridge instead."
        )
