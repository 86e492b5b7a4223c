"""Sections of the report on a request: what was done to the weights, and what that bounds."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from lqf_lightning.analysis.scrub_options import ScrubOptions
from lqf_lightning.analysis.scrubbed import Scrubbed
from lqf_lightning.forgetting.gaussian_information import certified_information
from lqf_lightning.forgetting.noise import Noise
from lqf_lightning.linear import Certificate
from lqf_lightning.linear.metric import dot
from lqf_lightning.methods import LQF, Method

RECIPE_PASSES = 50.0  # epochs of the training that papers compare with


def model_section(method: Method) -> dict[str, Any]:
    """Which model it is.

    Args:
        method: The method.

    Returns:
        Plain values.
    """
    return {
        "method": type(method).__name__,
        "linear": isinstance(method, LQF),
        "parameters": sum(entry.numel() for entry in method.trained().values()),
        "backbone": method.backbone.name,
        "outputs": len(method.classes),
    }


def scrub_section(
    method: Method,
    found: Scrubbed,
    options: ScrubOptions,
    original: Mapping[str, Tensor],
    before: Certificate | None,
    verified: Certificate | None,
) -> dict[str, Any]:
    """What was done to the weights.

    Args:
        method: The method.
        found: The scrub.
        options: Of the request.
        original: Weights before, by name.
        before: How far these were from the optimum on the retained samples, if that is known.
        verified: The same of the new weights before noise, from a gradient of its own.

    Returns:
        Plain values; None where something does not exist.
    """
    change = {name: weight - original[name] for name, weight in found.weights.items()}
    certificate, tolerance = found.certificate, options.tolerance
    if isinstance(method, LQF) and tolerance is options.distance is None:
        tolerance = method.tolerance
    return {
        "name": found.name, "steps": found.steps, "passes": found.passes, "seconds": found.seconds,
        "recipe_passes": RECIPE_PASSES,
        "relative_gradient": None if certificate is None else _plain(certificate.relative_gradient),
        "relative_gradient_before": None if before is None else _plain(before.relative_gradient),
        "distance_bound": None if certificate is None else certificate.distance_bound,
        "distance_bound_before": None if before is None else before.distance_bound,
        "verified_relative_gradient": None if verified is None else _plain(verified.relative_gradient),
        "tolerance": tolerance, "distance": options.distance,
        "weight_change": math.sqrt(dot(change, change)),
        "weight_norm": math.sqrt(dot(dict(original), dict(original))),
        "noise": None if options.noise == "none" else {"kind": options.noise, "sigma": options.sigma},
        "curve": found.curve,
    }  # fmt: skip


def bound_section(
    method: Method,
    found: Scrubbed,
    noise: Noise | None,
    measured: float | None = None,
    queries: Sequence[Mapping[str, float]] = (),
) -> dict[str, Any]:
    """What the released weights can tell at most.

    Args:
        method: The method.
        found: The scrub.
        noise: That the weights are released with.
        measured: What the weights tell of the difference to a retrained model, in nats, if there is one.
        queries: What answers tell of it, of `query_curve`.

    Returns:
        Plain values: "nats" at most, without the intercept; "intercept_nats" what it adds; None: there is no bound.
        "measured_nats" and "queries" are of the retrained model at hand, which its own solver leaves at a distance from
        the optimum too.
    """
    if found.certificate is None or not isinstance(method, LQF):
        return {"nats": None, "intercept_nats": None, "measured_nats": None, "queries": [], "assumes": []}
    weakest = min(method.penalty_weights().values())  # of the metric that the certificate's norm is of
    distance = found.certificate.distance_bound / math.sqrt(weakest)
    alone, extra = certified_information(noise, distance), None
    if found.intercept_bound is not None and noise is not None:
        extra = certified_information(noise, distance, found.intercept_bound) - alone
    known = found.intercept_bound == 0 or extra is not None  # without the intercept there is no bound for the whole
    return {
        "nats": _plain(alone) if known else None, "intercept_nats": None if extra is None else _plain(extra),
        "measured_nats": measured, "queries": [dict(entry) for entry in queries], "assumes": _assumptions(found),
    }  # fmt: skip


def _assumptions(found: Scrubbed) -> list[str]:
    words = [
        "The model that was retrained without the samples is the optimum of the same objective, with the same ridge "
        "per sample, on the samples that are left, and is released with noise of the same kind.",
        "The weights before noise, the noise and its seed are known to nobody.",
        "The noisy weights are released once. A second release with other noise is a second answer.",
        "The bound is about the released weights. This report holds numbers of the weights before noise (distances, "
        "gradients) and is not published with them.",
        "Gradient, noise and weights are rounded as floating-point numbers are; rounding is not part of the bound.",
    ]
    if found.intercept_bound is None:
        words.append(
            "The intercept of the head, which carries no penalty, is at its optimum: its bound was not computed."
        )
    return words


def _plain(value: float) -> float | None:
    return value if math.isfinite(value) else None
