"""Figures and claims of `forget.py` from its parts."""

from collections.abc import Mapping
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from forget_parts import Case, certify, distance, read_outs, requests, without
from safetensors.torch import load_file

RECIPE = 50  # passes of the training that the comparison is with: epochs of stochastic gradient descent
TOLERANCE = 1e-3  # relative gradient above which a scrub is not to be released


def kernel_figures(found: Mapping[str, Any]) -> dict[str, Any]:
    """Of the set whose kernel is known."""
    first, models = found["heads"][0], found["models"]
    answers = first["requests"]
    return {
        "seconds": mean(row["seconds"] for row in answers), "passes": mean(row["passes"] for row in answers),
        "largest_distance_bound": max(row["distance_bound"] for row in answers),
        "moved_by_a_request": mean(row["moved"] for row in answers), "retrain_seconds": found["retrain_seconds"],
        "retrain_assembly": found["retrain_assembly"], "mu": first["mu"], "cohort": found["cohort"],
        "sigma": found["sigma"], "noisy_test_error": found["noisy_test_error"], "models": models,
        "nats": 0.5 * (max(row["distance_bound"] for row in answers) / found["sigma"]) ** 2,
        "heads": [head["requests"][-1]["forgotten"] for head in found["heads"]],
        "requests": [{k: row[k] for k in ("request", "seconds", "distance_bound", "moved")} for row in answers],
    }  # fmt: skip


def descent_figures(case: Case, size: Mapping[str, Any], work: Path, entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Of the set that conjugate gradients work on, whose solutions are in files."""
    gone, mu = requests(case.samples, 0.01, size["requests"]), size["mu"]
    base, everything = load_file(work / "base.safetensors"), torch.arange(case.samples)
    zero = certify(case, everything, mu, case.zeros())["distance_bound"]
    compared = []
    for k in size["retrained"]:
        cohort, kept = torch.cat(list(gone[:k])), without(case.samples, gone[:k])
        scrubbed, cold = (load_file(work / f"{name}_{k}.safetensors") for name in ("scrub", "retrain"))
        models = {"original": base, "scrubbed": scrubbed, "retrained": cold}
        compared.append({
            "request": k, "scrubbed_to_retrained": distance(scrubbed, cold),
            "original_to_retrained": distance(base, cold), "scrubbed_to_original": distance(scrubbed, base),
            "models": {name: read_outs(case, case.outputs(weights), cohort, kept) for name, weights in models.items()},
        })  # fmt: skip
    return {
        "at_zero": zero, "wanted": size["tolerance"] * zero, "mu": mu, "compared": compared,
        "requests": [{k: entry[k] for k in ("passes", "steps", "seconds", "distance_bound")} for entry in entries],
    }  # fmt: skip


def claims(figures: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what is promised."""
    kernel, descent = figures["dtd10"], figures["cifar10"]
    models = kernel["models"]
    original, scrubbed, retrained, wrong = (models[name] for name in ("original", "scrubbed", "retrained", "wrong"))
    cold = mean(entry["passes"] for entry in descent["retrained"])
    warm = mean(entry["passes"] for entry in descent["requests"])
    spread = {key: _spread([head[key] for head in kernel["heads"]]) for key in ("forget_error", "test_error")}
    attack = abs(scrubbed["entropy_attack"] - retrained["entropy_attack"])
    ratio = abs(scrubbed["likelihood_ratio"]["auc"] - retrained["likelihood_ratio"]["auc"])
    rows = [
        ("dtd10: seconds of retraining over those of a request, the kernel given",
         kernel["retrain_seconds"] / kernel["seconds"], 30, True),
        ("dtd10: passes of the 50-epoch recipe over those of a request", RECIPE / kernel["passes"], 16, True),
        ("dtd10: distance to retrained weights, of the scrubbed over the original model",
         scrubbed["distance"] / original["distance"], 0.01, False),
        *((f"dtd10: {key} of scrubbed less retrained, against its spread over heads {spread[key]:.3f}",
           abs(scrubbed[key] - retrained[key]), spread[key], False) for key in spread),
        ("dtd10: entropy attack, scrubbed less retrained, against its standard error", attack,
         retrained["entropy_attack_error"], False),
        ("dtd10: likelihood-ratio attack, scrubbed less retrained, against its standard error", ratio,
         retrained["likelihood_ratio"]["error"], False),
        ("dtd10: best possible attack on scrubbed against retrained, area under the curve",
         scrubbed["best_attack_auc"], 0.6, False),
        ("dtd10: releases of scrubbed and retrained, p-value of a permutation test", scrubbed["release_p"], 0.05, True),
        ("dtd10: relative gradient of the wrongly normalized scrub, above what may be released",
         wrong["relative_gradient"], TOLERANCE, True),
        ("cifar10: passes of a request over those of retraining by the same solver", warm / cold, 0.25, False),
        ("cifar10: passes of the 50-epoch recipe over those of a request", RECIPE / warm, 16, True),
        *((f"cifar10: distance to retrained weights after {row['request']} requests, scrubbed over original",
           row["scrubbed_to_retrained"] / row["original_to_retrained"], 0.1, False) for row in descent["compared"]),
    ]  # fmt: skip
    return [
        {"claim": text, "value": value, "target": target, "holds": value >= target if least else value <= target}
        for text, value, target, least in rows
    ]


def _spread(values: list[float]) -> float:
    return max(values) - min(values)
