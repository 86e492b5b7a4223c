"""What exact leave-one-out costs next to training again without every sample, and what cheaper kernels keep of it.

EfficientNet-Lite0 with its ImageNet weights and a random head, all layers linearized, on dtd10 (10 classes). The scores
of all samples come from one kernel: exact, its trace (all outputs, or two random combinations of them), or that of the
last layer; end to end, that is collecting, inner products, factorization and scores. A refit is conjugate gradients
from zero to a relative gradient of 1e-4 with weight 0 for the sample, preconditioned by a sketch that all share (plain
and with K-FAC are run once, for comparison); five are run, and their mean stands for all. The ridge is that of the
trace kernel's best leave-one-out accuracy; the last layer is also judged at its own. Kernels and refits evaluate the
network in different orders, so that in single precision they differ by activations of changed sign; a small problem in
double precision tells that nothing else does. Time is that of the process with one thread on a CPU, so that other
programs do not count, the wall clock on a GPU. Finished parts are kept in the work folder.

    python benchmarks/leave_one_out.py --data DIR [--quick | --full] [--work DIR] [--output FILE]

DIR holds dtd10/train/CLASS/*.png. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from leave_one_out_parts import FORMS, TOLERANCE, Case, check_in_double, choose_ridge, refit, relative, score
from step_cost import cpu_name
from torch import Tensor

SIZES: dict[str, dict[str, Any]] = {
    "quick": {"train": 16, "val": 4, "side": 32, "steps": 30, "refits": 2, "double": 6},
    "default": {"train": 160, "val": 100, "side": 64, "steps": 200, "refits": 5, "double": 24},
    "full": {"train": 1000, "val": 100, "side": 224, "steps": 400, "refits": 5, "double": 24},
}
TITLES = {"trace": "trace kernel", "trace_2": "trace kernel by two combinations", "last_layer": "last layer"}


def spearman(one: Tensor, other: Tensor) -> float:
    """Correlation of ranks."""
    ranks = torch.stack([values.argsort().argsort().double() for values in (one, other)])
    return float(torch.corrcoef(ranks)[0, 1])


def compare(part: Mapping[str, Any], exact: Mapping[str, Any]) -> dict[str, float]:
    """A cheaper kernel's scores against the exact ones, over all samples."""
    found, wanted = torch.tensor(part["residual"]), torch.tensor(exact["residual"])
    errors = (found - wanted).norm(dim=1) / wanted.norm(dim=1)
    changes = torch.tensor(part["function_change"]), torch.tensor(exact["function_change"])
    return {
        "spearman_squared_residual": spearman(found.square().sum(1), wanted.square().sum(1)),
        "spearman_function_change": spearman(*changes),
        "largest_relative_error": float(errors.max()), "median_relative_error": float(errors.median()),
    }  # fmt: skip


def judge_refits(refits: list[dict[str, Any]], exact: Mapping[str, Any], samples: int) -> dict[str, Any]:
    """Time of refits, how far they spread, and how well the exact scores foretell them."""
    seconds = torch.tensor([entry["seconds"] for entry in refits], dtype=torch.float64)
    errors, bounds, changes = [], [], []
    for entry in refits:
        sample, wanted = entry["sample"], torch.tensor(entry["residual"], dtype=torch.float64)
        errors.append(relative(torch.tensor(exact["residual"][sample], dtype=torch.float64), wanted))
        bounds.append(exact["row_norm"][sample] * entry["distance_bound"] / float(wanted.norm()))
        moved = torch.tensor(exact["validation"]).double() - torch.tensor(entry["validation"]).double()
        change = float(moved.square().sum(1).mean())
        changes.append(abs(exact["function_change"][sample] - change) / change)
    return {
        "kind": refits[0]["kind"], "setup": refits[0]["setup"], "steps": [entry["steps"] for entry in refits],
        "largest_relative_gradient": max(entry["relative_gradient"] for entry in refits), "seconds": seconds.tolist(),
        "mean_seconds": float(seconds.mean()), "spread": float((seconds.max() - seconds.min()) / seconds.mean()),
        "deviation": float(seconds.std() / seconds.mean()),
        "all_samples_seconds": refits[0]["setup"] + samples * float(seconds.mean()),
        "relative_errors": errors, "largest_relative_error": max(errors), "bounds_by_tolerance": bounds,
        "function_change_relative_errors": changes,
    }  # fmt: skip


def summarize(parts: Mapping[str, Any], refits: list[dict[str, Any]], samples: int) -> dict[str, Any]:
    """The figures."""
    exact = parts["exact"]
    judged = judge_refits(refits, exact, samples)
    figures: dict[str, Any] = {
        "ridge": parts["ridge"], "double": parts["double"], "refits": judged,
        "slower_refits": {
            kind: {key: parts[f"refit_{kind}"][key] for key in ("seconds", "setup", "steps", "relative_gradient")}
            for kind in ("plain", "kfac")
        },
        "forms": {},
    }  # fmt: skip
    for name in (*FORMS, "last_layer_own_ridge"):
        part = parts[name]
        entry = {kind: part[kind] for kind in ("alone", "with_validation", "accuracy")}
        entry["cheaper_than_refits"] = judged["all_samples_seconds"] / part["alone"]["total"]
        entry["cheaper_with_validation"] = judged["all_samples_seconds"] / part["with_validation"]["total"]
        figures["forms"][name] = entry if name == "exact" else {**entry, **compare(part, exact)}
    return figures


def claims(figures: Mapping[str, Any], size: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    where = f"n = {size['train']}, {size['side']} px"
    forms, refits = figures["forms"], figures["refits"]
    result = [
        _claim(f"{where}: exact, n refits over it", forms["exact"]["cheaper_than_refits"], 20.0, least=True),
        _claim(f"{where}: largest relative gradient of the refits", refits["largest_relative_gradient"], TOLERANCE),
        _claim(f"{where}: exact residual against refits, relative error", refits["largest_relative_error"], 1e-2),
        _claim(f"n = {size['double']}, double precision: the same", figures["double"]["relative_error"], 1e-6),
    ]
    for name, title in TITLES.items():
        entry = forms[name]
        result.append(_claim(f"{where}: {title}, n refits over it", entry["cheaper_than_refits"], 100.0, least=True))
        for key, text in (
            ("spearman_squared_residual", "squared residuals"),
            ("spearman_function_change", "function changes"),
        ):
            result.append(_claim(f"{where}: {title}, Spearman with exact {text}", entry[key], 0.98, least=True))
    return result


def _claim(text: str, value: float, target: float, least: bool = False) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": value >= target if least else value <= target}


def run(data: Path, size: Mapping[str, Any], work: Path) -> dict[str, Any]:
    """All parts, those kept from before included."""
    case: Case | None = None
    parts: dict[str, Any] = {}

    def part(name: str, function: Callable[[Case], Any]) -> Any:
        nonlocal case
        file = work / f"{name}.json"
        if not file.exists():
            case = case or Case(data, size["train"], size["val"], size["side"])
            file.write_text(json.dumps(function(case)))
        parts[name] = json.loads(file.read_text())
        print(name, json.dumps(parts[name])[:300], flush=True)
        return parts[name]

    part("double", lambda _: check_in_double(data, size))
    ridges = part("ridge", choose_ridge)
    ridge = ridges["trace"]["ridge"]
    for name in FORMS:
        part(name, lambda c, name=name: score(c, name, ridge))
    part("last_layer_own_ridge", lambda c: score(c, "last_layer", ridges["last_layer"]["ridge"]))
    chosen = torch.randperm(size["train"], generator=torch.Generator().manual_seed(0))[: size["refits"]].tolist()
    steps = size["steps"]
    refits = [
        part(f"refit_{number}", lambda c, s=sample: refit(c, ridge, s, steps, "sketch"))
        for number, sample in enumerate(chosen)
    ]
    plain = part("refit_plain", lambda c: refit(c, ridge, chosen[0], steps, "plain"))
    part("refit_kfac", lambda c: refit(c, ridge, chosen[0], plain["steps"], "kfac"))
    return summarize(parts, refits, size["train"])


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder with dtd10/train")
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--full", action="store_true", help="for a GPU: 1000 images of 224 pixels")
    parser.add_argument("--work", type=Path, default=Path("runs/leave_one_out"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    name = "quick" if options.quick else "full" if options.full else "default"
    size, work = SIZES[name], options.work / name
    work.mkdir(parents=True, exist_ok=True)
    figures = run(options.data, size, work)
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    report = json.dumps({
        "benchmark": "leave_one_out", "size": name, "sizes": size, "figures": figures,
        "claims": [] if options.quick else claims(figures, size),
        "machine": gpu or f"{cpu_name()}, one thread, shared with other programs", "date": str(datetime.date.today()),
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
    })  # fmt: skip
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
