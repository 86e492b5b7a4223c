"""Whether a scrubbed model may be released: the rules, and what each of them found."""

import math
from collections.abc import Callable, Mapping
from itertools import pairwise
from typing import Any

from lqf_lightning.deletion.behavior_rules import behavior_cautions, behavior_failures
from lqf_lightning.deletion.report_words import advantage, percent, quantity

Report = Mapping[str, Any]
_USELESS = 0.9  # advantage of a test that a bound leaves
_ROUNDING = 1.1  # a gradient that is measured again is summed in another order


def judge(report: Report) -> dict[str, Any]:
    """Judge a scrub by its report.

    Failures: the measured gradient on the retained samples is above the tolerance (what a wrong normalization leads
    to); answers to queries seem to tell more than the weights, or fewer queries more; the deleted samples remain in the
    run folder; the model behaves otherwise than the retrained one, beyond the error of the comparison (see
    `behavior_rules`). Cautions: what is not proven, not measured or weak. A measured number that is no number fails.

    Args:
        report: The report, with or without a judgement.

    Returns:
        ``passed`` (no failure), ``verdict`` (a sentence), ``failures``, ``cautions`` and ``flags``, the two in this
        order; all as plain text.
    """
    failure_rules: tuple[Callable[[Report], list[str]], ...] = (
        _gradient, _queries, _remains, behavior_failures,
    )  # fmt: skip
    caution_rules: tuple[Callable[[Report], list[str]], ...] = (
        _proof, _noise, _claim, _weak, behavior_cautions, _files, _purge,
    )  # fmt: skip
    failures = [sentence for rule in failure_rules for sentence in rule(report)]
    cautions = [sentence for rule in caution_rules for sentence in rule(report)]
    return {
        "passed": not failures,
        "verdict": _verdict(report, failures),
        "failures": failures,
        "cautions": cautions,
        "flags": failures + cautions,
    }


def _verdict(report: Report, failures: list[str]) -> str:
    scrub, nats = report["scrub"], _whole(report["bound"])
    number = f"{report['request']['number']:,}"
    if failures:
        return f"Do not release this model: {len(failures)} {'check' if len(failures) == 1 else 'checks'} failed."
    if not report["model"]["linear"]:
        return f"No check found a trace of the {number} samples, but nothing is proven: this scrub is a heuristic."
    if _verified(scrub) is None:
        return f"No check found a trace of the {number} samples, but the scrub was not verified by a new gradient."
    if scrub.get("noise") is None and nats == 0:
        return (
            f"The trained weights are zero: nothing that was learned from the {number} samples is left in this model."
        )
    if scrub.get("noise") is None or nats is None or not math.isfinite(nats):
        return (
            f"The weights are proven to be near those of a model trained without the {number} samples "
            f"(distance at most {quantity(scrub.get('distance_bound'))}); without noise no amount of information is."
        )
    if advantage(nats) > _USELESS:
        return (
            f"No check failed, but the bound of {quantity(nats)} nats proves nothing: the noise is too small for how "
            "far the scrub may be from a model that was trained without the samples."
        )
    return (
        f"This model is, up to {quantity(nats)} nats, one that was trained without the {number} samples, as far as "
        "the assumptions below hold."
    )


def _verified(scrub: Report) -> float | None:
    return scrub.get("verified_relative_gradient")


def _gradient(report: Report) -> list[str]:
    scrub = report["scrub"]
    measured, tolerance = _verified(scrub), scrub.get("tolerance")
    if measured is None or tolerance is None or measured <= _ROUNDING * tolerance:
        return []
    claimed = scrub.get("relative_gradient")
    stopped = claimed is not None and claimed > tolerance
    why = (
        "The solver stopped before it was there: set max_steps or tolerance higher."
        if stopped
        else "A scrub that has converged and still leaves a gradient has a wrong normalization."
    )
    return [
        f"This is not the optimum without the samples: the gradient on the retained samples, measured anew, is "
        f"{quantity(measured)} of that of the untrained model, the tolerance is {quantity(tolerance)}. {why}"
    ]


def _queries(report: Report) -> list[str]:
    bound = report["bound"]
    measured = bound.get("measured_nats")  # of the same two models as the queries
    told, whole = (
        [entry["nats"] for entry in bound.get("queries") or []],
        _whole(bound) if measured is None else measured,
    )
    failures = []
    if whole is not None and not all(nats <= whole * (1 + 1e-6) for nats in told):
        failures.append(
            f"The numbers contradict each other: answers to queries would tell {quantity(max(told))} nats, the weights "
            f"that they follow from {quantity(whole)}."
        )
    if not all(later >= earlier * (1 - 1e-6) for earlier, later in pairwise(told)):
        failures.append("The numbers contradict each other: more queries would tell less than fewer.")
    return failures


def _whole(bound: Report) -> float | None:
    nats: float | None = bound.get("nats")
    return None if nats is None else nats + (bound.get("intercept_nats") or 0.0)


def _remains(report: Report) -> list[str]:
    remains = (report.get("removed") or {}).get("remains")
    if not remains:
        return []
    return [f"Traces of the samples are still in the run folder: {', '.join(map(str, remains))}."]


def _proof(report: Report) -> list[str]:
    scrub = report["scrub"]
    if not report["model"]["linear"]:
        return [
            f"Heuristic, not a proof: nobody knows how far a network scrubbed by {scrub['name']!r} is from one that "
            "was retrained. Train with method=lqf or method=mixed_privacy for a proof."
        ]
    if _verified(scrub) is None or scrub.get("tolerance") is None:
        return ["The gradient on the retained samples was not measured anew: only the solver vouches for its result."]
    return []


def _noise(report: Report) -> list[str]:
    if report["scrub"].get("noise") is None and _whole(report["bound"]) != 0:
        return ["No noise was added: the bound on information is infinite. Set sigma=1e-3."]
    return []


def _claim(report: Report) -> list[str]:
    scrub = report["scrub"]
    measured, claimed = _verified(scrub), scrub.get("relative_gradient")
    if measured is None or claimed is None or measured <= 2 * claimed:
        return []
    return [
        f"The solver claims a relative gradient of {quantity(claimed)}, measured is {quantity(measured)}: a distance "
        "bound that rests on the claim is too small by their ratio."
    ]


def _weak(report: Report) -> list[str]:
    nats = _whole(report["bound"])
    if report["scrub"].get("noise") is None:
        return []
    if nats is None or not math.isfinite(nats):
        return ["There is no bound on the information that is left."]
    gain = advantage(nats)
    if gain <= 0.5:
        return []
    return [
        f"The bound is weak: it leaves a test an advantage of up to {percent(gain)}. Scrub to a lower tolerance or add "
        "more noise."
    ]


def _files(report: Report) -> list[str]:
    request = report["request"]
    left = request["number"] - (request.get("files_gone") or 0)
    if left <= 0:
        return []
    return [
        f"{left:,} of the {request['number']:,} image files still exist; the model has forgotten them, the disk not."
    ]


def _purge(report: Report) -> list[str]:
    removed = report.get("removed")
    if removed is None:
        return [
            "Nothing was deleted from the run folder when this was written: caches and checkpoints there may hold the "
            "samples. removed.json, where there is one, says what was deleted since."
        ]
    if skipped := removed.get("not_inspected"):
        return [f"Nobody looked into {', '.join(map(str, skipped))}: look whether the samples are in there."]
    return []
