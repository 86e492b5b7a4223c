"""The certificate of given weights, computed from nothing but them and the training samples that are there."""

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.analysis.counted_passes import CountedPasses
from lqf_lightning.linear import Certificate
from lqf_lightning.methods import LQF
from lqf_lightning.methods.lqf_refusals import refuse_expansions


@dataclass(frozen=True)
class VerifiedWeights(Certificate):
    """The certificate of penalized weights, and what it does not cover.

    Attributes:
        intercept_gap: Length of the difference between the intercept given and the one that is best for the weights:
            rounding, or the intercept of another solution. 0 where there is none.
        weight_norm: `|dw|` in the norm of the metric, the unit of `distance_bound`.
        passes: Work of the verification, in passes of training steps.
    """

    intercept_gap: float = 0.0
    weight_norm: float = 0.0
    passes: float = 0.0


def verify_linear(method: LQF, weights: Mapping[str, Tensor]) -> VerifiedWeights:
    """Compute how far weights are from the optimum on the training samples that the data module has now.

    In the stored precision of the weights, whoever has found them; a solver's own numbers play no part. All ranks call
    this together.

    Args:
        method: The method, attached to a trainer; its own dw plays no part.
        weights: By the names of `method.trained()`, intercept included.

    Returns:
        The certificate, the intercept at its optimum, and how far the one given is from there.
    """
    refuse_linear(method)
    with torch.inference_mode(False), torch.no_grad():
        movement = penalized_part(method, weights)
        passes = CountedPasses(method, movement)
        point = passes.measure(movement, passes.image, reference=None)
        found = point.certificate
        gap = intercept_gap(method, weights, point.intercept)
        norm = math.sqrt(passes.metric.squared_norm(movement))
        numbers = (found.relative_gradient, found.distance_bound, found.objective)
        return VerifiedWeights(*numbers, gap, norm, passes.count)


def penalized_part(method: LQF, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Cut out the weights that carry the penalty, as the method would store them.

    Args:
        method: The method.
        weights: By the names of `method.trained()`.

    Returns:
        dw without the intercept, in the type of the method.

    Raises:
        ValueError: Names differ from those of the method, or a number is not finite.
    """
    deltas = method.linearized.deltas
    if odd := sorted(set(weights) ^ set(deltas)):
        raise ValueError(f"weights must have the names of method.trained(); {odd[0]!r} is missing there, or unknown")
    broken = [name for name, entry in weights.items() if not bool(torch.isfinite(entry).all())]
    if broken:
        raise ValueError(f"{broken[0]!r} holds values that are not finite: nothing can be said about such weights")
    return {name: weights[name].detach().to(deltas[name]).clone() for name in method.penalty_weights()}


def intercept_gap(method: LQF, weights: Mapping[str, Tensor], best: Tensor) -> float:
    """How far a stored intercept is from the best one.

    Args:
        method: The method.
        weights: By the names of `method.trained()`.
        best: The intercept that is best for the other weights (C,).

    Returns:
        The length of the difference, 0 if the method has no bias without penalty.
    """
    if method.intercept_name is None:
        return 0.0
    return float((weights[method.intercept_name].detach().to(best) - best).norm())


def refuse_linear(method: LQF) -> None:
    """Check that a method has an optimum that depends on the training samples alone, and can be certified.

    Args:
        method: The method.

    Raises:
        TypeError: It is not `lqf`.
        ValueError: It has no such optimum.
    """
    if not isinstance(method, LQF):
        raise TypeError(f"an exact scrub is for linear models, method=lqf; got {type(method).__name__}")
    options = method.hparams
    if options["loss"] != "squared":
        raise ValueError(f"an exact scrub is for the squared loss, got loss={options['loss']!r}: train with "
                         "method.loss=squared")  # fmt: skip
    if options["metric"] == "kfac":
        raise ValueError(
            "with metric='kfac' the penalty itself is made of the training samples, those to forget included: train "
            "with method.metric=identity or learned, for a penalty by layer groups"
        )
    refuse_expansions(method.relinearize, method.expansions, "certificates of forgetting")
    if method.matching is not None:
        raise ValueError(
            "the method matches a reference, whose answers may come from the samples to forget: train without, "
            "method.reference=null"
        )
    if math.isnan(method.ridge) or not method.ridge > 0:
        raise ValueError(
            f"an exact scrub needs a positive ridge, got {method.ridge} (a ridge that is not a number has not been "
            "chosen yet: open a trained checkpoint). Train with method.ridge=1e-3"
        )
    kind = next(iter(method.linearized.deltas.values())).dtype
    if kind not in (torch.float32, torch.float64):
        raise ValueError(f"{kind} weights are too coarse for a certificate. Set trainer.precision=32-true")
