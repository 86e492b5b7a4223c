"""A report with everything in it, of a good scrub."""

from typing import Any


def good_report() -> dict[str, Any]:
    return {
        "request": {
            "cohort": "fraction 0.01, seed 0", "number": 40, "classes": {"bus": 22, "c<a>t": 18}, "train_before": 4000,
            "train_after": 3960, "date": "2026-01-02T03:04:05", "run": "run & co", "position": 2, "files_gone": 40,
        },
        "model": {"method": "lqf", "linear": True, "parameters": 3_400_000, "backbone": "lite0", "outputs": 10},
        "scrub": {
            "name": "newton", "steps": 3, "passes": 2.5, "seconds": 12.0, "recipe_passes": 50.0,
            "relative_gradient": 1e-4, "relative_gradient_before": 3e-2, "distance_bound": 2e-4,
            "verified_relative_gradient": 1.02e-4, "tolerance": 1e-3, "weight_change": 0.3, "weight_norm": 5.0,
            "noise": {"kind": "isotropic", "sigma": 1e-3},
            "curve": [
                {"passes": 1.0, "relative_gradient": 3e-2, "distance_bound": 6e-2},
                {"passes": 2.5, "relative_gradient": 1e-4, "distance_bound": 2e-4},
            ],
        },
        "bound": {
            "nats": 0.02, "intercept_nats": 0.001, "assumes": ["the same objective"],
            "queries": [{"number": 1, "nats": 1e-4}, {"number": 100, "nats": 3e-3}],
        },
        "read_outs": {
            "models": {
                "original": model(forget=0.0, attack=0.95, auc=0.8, distance=0.29, relearn=0),
                "scrubbed": model(forget=0.175, attack=0.55, auc=0.51, distance=0.009, relearn=60),
                "retrained": model(forget=0.2, attack=0.5, auc=0.5, distance=0.0, relearn=62),
            },
            "against": "retrained", "counts": {"retain": 3960, "forget": 40, "test": 1000},
            "relearn": {"learning_rate": 0.01, "threshold": "the original's loss", "sampling": "with replacement"},
            "norm": "L1 of softmax outputs",
            "likelihood_ratio": {"shadows": 64, "exact": True, "why": None},
        },
        "not_covered": ["the head's initialization"],
        "hashes": {"weights": "ab12", "cohort": "cd34"},
        "removed": {"deleted": ["kernel.bin"], "filtered": ["manifest.parquet"], "not_inspected": [], "remains": []},
    }  # fmt: skip


def model(*, forget: float, attack: float, auc: float, distance: float, relearn: int) -> dict[str, Any]:
    return {
        "retain_error": 0.03, "forget_error": forget, "test_error": 0.17, "forget_loss": 0.5, "test_loss": 0.6,
        "entropy_attack": attack, "entropy_attack_error": 0.08, "likelihood_ratio_auc": auc,
        "likelihood_ratio_error": 0.05, "relearn_steps": relearn, "anamnesis_index": relearn / 62,
        "activation_distance": {"retain": distance / 2, "forget": distance, "test": distance / 1.2},
        "tug_of_war": 0.9,
    }  # fmt: skip
