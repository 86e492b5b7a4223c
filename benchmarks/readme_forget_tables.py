"""Tables of the README on forgetting."""

from statistics import mean
from typing import Any

from readme_cells import percent, rows


def forget(report: dict[str, Any]) -> str:
    """What requests and retrainings cost."""
    kernel, descent = report["figures"]["dtd10"], report["figures"]["cifar10"]
    base, cold = descent["base"], descent["retrained"]
    warm = descent["requests"]
    body = [
        [
            "dtd10, 640 images, kernel kept", f"{kernel['passes']:.1f}", f"{kernel['seconds']:.0f} s",
            f"{kernel['retrain_seconds']:.0f} s (kernel assembled anew)", f"{kernel['largest_distance_bound']:.1g}",
            f"{kernel['moved_by_a_request']:.2g}",
        ],
        [
            "cifar10, 5,000 images, conjugate gradients", f"{mean(e['passes'] for e in warm):.1f}",
            f"{mean(e['seconds'] for e in warm):.0f} s",
            f"{mean(e['seconds'] for e in cold):.0f} s ({mean(e['passes'] for e in cold):.1f} passes)",
            f"{max(e['distance_bound'] for e in [base, *warm]):.2g}",
            f"{descent['compared'][0]['original_to_retrained']:.2g}",
        ],
    ]  # fmt: skip
    header = ["data", "passes", "time of a request", "of retraining", "proven distance from the optimum"]
    return rows([*header, "change by a request"], body)


def forget_read_outs(report: dict[str, Any]) -> str:
    """Four models and what can be read out of them."""
    kernel = report["figures"]["dtd10"]
    names = {
        "original": "before", "scrubbed": "after", "retrained": "retrained",
        "wrong": "scrubbed with a wrong normalization",
    }  # fmt: skip
    body = []
    for key, text in names.items():
        own = kernel["models"][key]
        ratio = own["likelihood_ratio"]
        body.append([
            text, percent(own["retain_error"]), percent(own["forget_error"]), percent(own["test_error"]),
            f"{own['entropy_attack']:.2f} ± {own['entropy_attack_error']:.2f}",
            f"{ratio['auc']:.2f} ± {ratio['error']:.2f}",
            f"{own['activation_distance']:.3f}", f"{own['relative_gradient']:.1g}", f"{own['release_p']:.3f}",
        ])  # fmt: skip
    header = ["model", "error on retained", "forgotten", "test images", "entropy attack", "likelihood ratio, area"]
    return rows([*header, "activation distance", "relative gradient", "releases told apart (p)"], body)


def mixed_privacy(report: dict[str, Any]) -> str:
    """Accuracy of core and user models."""
    names = {"classes": "classes 0-4 core, 5-9 user", "halves": "half of every class"}
    body = []
    for split, text in names.items():
        own = report["figures"][split]
        models = [own[name]["all"] for name in ("core_only", "user", "forgotten_all", "scrubbed", "retrained")]
        body.append([text, *(percent(value) for value in models)])
    header = [
        "split",
        "core only",
        "with user weights",
        "all forgotten",
        "10 % forgotten",
        "retrained without the 10 %",
    ]
    return rows(header, body)
