"""Runs whose training time cannot be predicted, told before anything is computed."""

import logging
from typing import Any, cast

from lightning import Trainer

from lqf_lightning.methods import LQF, Finetune, Method

log = logging.getLogger(__name__)


def refuse_unpredictable(method: Method, trainer: Trainer) -> None:
    """Check that a run is plain descent on labels, from its beginning on.

    Args:
        method: The method.
        trainer: Its trainer.

    Raises:
        ValueError: The method, its solver or preconditioner, a reference, or an option of the trainer stands in the
            way; the message says which.
    """
    if not isinstance(method, LQF) and type(method) is not Finetune:
        raise ValueError(
            f"training time is predicted for lqf and finetune, got {type(method).__name__}. Set method=finetune, or "
            "leave the callback training_time out"
        )
    if isinstance(method, LQF):
        _refuse_lqf(method)
    if trainer.accumulate_grad_batches != 1:
        raise ValueError(
            "training time is predicted for a step per batch, got trainer.accumulate_grad_batches="
            f"{trainer.accumulate_grad_batches}. Set trainer.accumulate_grad_batches=1 and a larger data.batch_size"
        )
    if trainer.gradient_clip_val:
        raise ValueError(
            f"a clipped gradient is not predictable, got trainer.gradient_clip_val={trainer.gradient_clip_val}. Set "
            "trainer.gradient_clip_val=null"
        )


def _refuse_lqf(method: LQF) -> None:
    options = method.hparams
    if options["solver"] != "sgd":
        raise ValueError(
            f"solver={options['solver']} takes no stochastic steps whose number could be predicted. Set "
            "method.solver=sgd, or leave the callback training_time out"
        )
    if method.preconditioner is not None:
        raise ValueError(
            "with a K-FAC preconditioner training follows another kernel than that of the network, which is not "
            "assembled. Set method.preconditioner=null"
        )
    if method.matching is not None:
        raise ValueError("training time is predicted for labels alone, got a reference. Set method.reference=null")


def left_out(method: Method, trainer: Trainer) -> list[str]:
    """Find what a run has and a forecast leaves out.

    Args:
        method: The method.
        trainer: Its trainer.

    Returns:
        Of "augmentation" and "batch statistics" what the run has.
    """
    data: Any = cast(Any, trainer).datamodule
    random = getattr(getattr(data, "training_transform", None), "random", False)
    statistics = type(method) is Finetune and method.batch_norm == "train"
    return ["augmentation"] * bool(random) + ["batch statistics"] * statistics


def tell_what_is_not_modeled(method: Method, trainer: Trainer) -> None:
    """Say what a forecast leaves out, where the run has it.

    Args:
        method: The method.
        trainer: Its trainer.
    """
    missing = left_out(method, trainer)
    if "augmentation" in missing:
        log.info("training time is predicted for images as they are evaluated: data.augmentation plays no part")
    if "batch statistics" in missing:
        log.warning(
            "training time is predicted with batch-norm statistics as they are; this run normalizes by its batches, "
            "which may take many times longer. Set method.batch_norm=frozen for a prediction that fits"
        )
