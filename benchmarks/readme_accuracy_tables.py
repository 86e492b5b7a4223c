"""The README's tables about accuracy: errors of all methods, few images, leaky activations, second-order pooling."""

from typing import Any

from readme_cells import rows

_ORDER = (
    "finetune", "probe", "head", "gaf", "recipe", "no_kfac", "cross_entropy", "identity", "learned", "leaky", "block",
    "copies", "relinearized", "core",
)  # fmt: skip


def accuracy(report: dict[str, Any]) -> str:
    """Test error by method and image set, and the price of training."""
    sets = report["cases"]
    names = {
        key: row.get("name", "fine-tuning, tuned") for entry in sets.values() for key, row in entry["rows"].items()
    }
    body = []
    for key in (key for key in _ORDER if key in names):
        cells, minutes = [], []
        for entry in sets.values():
            row = entry["rows"].get(key)
            seconds = None if row is None else row.get("search_seconds", row["seconds"])
            cells.append("" if row is None else f"{row['error']:.1f}")
            minutes.append("" if not seconds else f"{seconds / 60:.1f}")
        middle = report["medians"].get(key)
        body.append([names[key], *cells, "" if middle is None else f"{middle:+.0f} %", " / ".join(minutes)])
    header = ["method", *sets, "median over fine-tuning", f"minutes: {' / '.join(sets)}"]
    return rows(header, body)


def shots(report: dict[str, Any]) -> str:
    """Test error with a few images per class."""
    body = []
    for name, by_number in report["shots"].items():
        for number, entry in by_number.items():
            errors = [f"{entry[key]:.1f}" for key in ("head", "learned", "finetune")]
            seconds = [f"{entry[f'{key}_seconds']:.0f}" for key in ("learned", "finetune")]
            body.append([name, number, *errors, *seconds])
    header = ["data", "images per class", "LQF, head only", "LQF", "fine-tuning, tuned"]
    return rows([*header, "seconds, LQF", "seconds, fine-tuning with its search"], body)


def outlook(report: dict[str, Any]) -> str:
    """What leave-one-out says beforehand, and what the test set says afterwards."""
    body = []
    for name, entry in report["cases"].items():
        known, table = entry["leave_one_out"], entry["rows"]
        if not known:
            continue
        before = [f"{100 * (1 - known[f'train/{key}']):.1f}" for key in ("probe_loo_acc", "loo_acc")]
        after = [f"{table[key]['error']:.1f}" for key in ("head", "learned", "finetune")]
        body.append([name, *before, *after, known["verdict"]])
    header = ["data", "probe, leave-one-out", "LQF, leave-one-out", "probe, test", "LQF, test", "fine-tuning, test"]
    return rows([*header, "advice"], body)


def adapt(report: dict[str, Any]) -> str:
    """Probes before the swap of activations, after it, and after adapting."""
    names = {"original": "as published", "swapped": "leaky, as swapped", "adapted": "leaky, adapted"}
    errors = report["errors"] | {"original": {"feature_error": 0.0, "agreement": 1.0}}
    body = []
    for key, text in names.items():
        probes = [f"{by_network[key]:.3f}" for by_network in report["probe"].values()]
        body.append([text, *probes, f"{errors[key]['feature_error']:.2f}", f"{errors[key]['agreement']:.2f}"])
    header = ["network", *(f"probe on {name}" for name in report["probe"])]
    return rows([*header, "relative error of features", "agreement with the published classes"], body)


def second_order(report: dict[str, Any]) -> str:
    """Probes on averaged features, on covariances, and on both."""
    cases: dict[tuple[str, int], dict[str, float]] = {}
    for row in report["rows"]:
        if row["pooling"] == "average" or row["width"] == 128:
            cases.setdefault((row["data"], row["image_size"]), {})[row["pooling"]] = row["test_acc"]
    body = [
        [data, str(size), *(f"{known[key]:.3f}" for key in ("average", "second_order", "both"))]
        for (data, size), known in cases.items()
    ]
    return rows(["data", "pixels", "average", "covariance", "both"], body)
