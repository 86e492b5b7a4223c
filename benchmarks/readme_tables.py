"""Writes the README's tables from the committed benchmark results.

    python benchmarks/readme_tables.py

Each table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and comes from ``benchmarks/results/NAME.json``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from readme_accuracy_tables import accuracy, adapt, outlook, second_order, shots
from readme_cells import percent, rows
from readme_forget_tables import forget, forget_read_outs, mixed_privacy
from readme_sample_tables import label_errors, summarize, training_time, unique_information

ROOT = Path(__file__).parent.parent


def step_cost(report: dict[str, Any]) -> str:
    """Cost ratios of a training step."""
    names = {
        "resnet18_64": "ResNet-18, 64 px",
        "resnet18_224": "ResNet-18, 224 px",
        "lite0_96": "EfficientNet-Lite0, 96 px",
    }
    keys = ("ratio", "memory_ratio", "ratio_to_in_place", "memory_ratio_to_in_place")
    body = [[text, *(f"{report['cases'][case][key]:.2f}" for key in keys)] for case, text in names.items()]
    return rows(
        ["linearized over ordinary step", "time", "peak memory", "time, in place", "peak memory, in place"], body
    )


def solve(report: dict[str, Any]) -> str:
    """How fast each way to solve the problem gets where, by data set."""
    names = {
        "plain": "conjugate gradients, bias penalized",
        "deflated": "conjugate gradients, intercept eliminated",
        "kfac_expand_10": "the same with K-FAC",
        "dual_trace": "the same with the trace kernel",
        "sketch": "the same with a sketch",
        "sgd": "SGD with K-FAC",
    }
    body = []
    for data, figures in report["sets"].items():
        for key, text in names.items():
            if key not in figures["runs"]:
                continue
            run = figures["runs"][key]
            left = run["final_relative_gradient"]
            far = "" if left is None else f"more than {run['passes']} ({left:.1g})"
            passes = far if run["passes_to_1e-3"] is None else str(run["passes_to_1e-3"])
            reach = [str(run["steps_to_accuracy"]), f"{run['seconds_to_accuracy']:.0f}"]
            objective = "" if run["final_objective"] is None else f"{run['final_objective']:,.0f}"
            body.append([data, text, passes, *reach, f"{run['final_val_acc']:.3f}", objective])
        tuned = figures["finetune"]
        text = "fine-tuning, search over learning rates"
        body.append([data, text, "", "", f"{tuned['seconds_search']:.0f}", f"{tuned['val_acc']:.3f}", ""])
    header = ["passes to a relative gradient of 1e-3", "passes to within .01 of the final accuracy", "seconds to it"]
    return rows(["data", "solver", *header, "validation accuracy", "objective"], body)


def kernel(report: dict[str, Any]) -> str:
    """What the forms of the kernel cost."""
    names = {
        "full": "exact",
        "diagonal": "without couplings of outputs",
        "trace": "trace",
        "trace_2_combinations": "trace, by two random combinations",
        "last_layer": "last layer alone",
    }
    forms = report["parts"]["lite0_forms"]
    body = [
        [text, *(f"{forms[key][phase]:.2g}" for phase in ("collect", "gram")), f"{forms[key]['peak_mib']:.0f}"]
        for key, text in names.items()
    ]
    return rows(["kernel", "seconds to collect", "seconds for inner products", "peak memory, MiB"], body)


def leave_one_out(report: dict[str, Any]) -> str:
    """Scores of all samples, next to refits and by cheaper kernels."""
    names = {
        "exact": "exact",
        "trace": "trace",
        "trace_2": "trace, by two random combinations",
        "last_layer_own_ridge": "last layer, at its own best ridge",
    }
    body = []
    for key, text in names.items():
        entry = report["figures"]["forms"][key]
        ranks = [entry.get(f"spearman_{what}", 1.0) for what in ("squared_residual", "function_change")]
        cost = [f"{entry['alone']['total']:.2g}", f"{entry['cheaper_than_refits']:.0f}"]
        body.append([text, *cost, *(f"{value:.3f}" for value in ranks)])
    header = ["seconds", "refits of all samples over it", "rank correlation, squared residual"]
    return rows(["kernel", *header, "rank correlation, change of outputs"], body)


def congruence(report: dict[str, Any]) -> str:
    """Error and negative flips of every way to update, by update."""
    names = {
        "none": "ordinary fine-tuning",
        "naive": "naive reweighting",
        "distillation": "distillation",
        "fd_lm": "FD-LM",
        "fd_kl": "FD-KL",
        "elodi": "ELODI, ensembles of 4",
        "ensembles of 4": "ensembles of 4 on both sides",
    }
    body = []
    for data, entry in report["sets"].items():
        for update, methods in entry["updates"].items():
            for method, values in methods.items():
                if method.endswith("_strong"):
                    continue  # no better than strength 1, see the JSON
                low, high = values["relative_nfr_interval"]
                shown = [f"{100 * values[key]:.1f}" for key in ("error_old", "error_new", "nfr", "pfr")]
                relative = f"{100 * values['relative_nfr']:.1f} ({100 * low:.1f} to {100 * high:.1f})"
                body.append([data, update, names.get(method, method), str(values["seeds"]), *shown, relative])
    return rows(["data", "update", "method", "seeds", "old error", "error", "NFR", "PFR", "relative NFR"], body)


def eman(report: dict[str, Any]) -> str:
    """Accuracy by method and teacher, few labels first."""
    names = {
        "eman": "EMAN",
        "ema": "batch statistics",
        "ema_copied": "student's statistics",
        "null": "none",
        "none": "",
    }
    body = []
    for row in report["rows"]:
        labels = row["labels"]
        few = "none" if labels is None else f"{labels} a class" if isinstance(labels, int) else f"{100 * labels:.0f} %"
        keys = ("student_acc", "teacher_acc") if labels is not None else ("probe_acc", "teacher_probe_acc")
        shown = [percent(row[key]) for key in (*keys, "knn_acc", "teacher_knn_acc")]
        teacher = names[row["teacher"]] if row["method"] != "finetune" else "(EMAN)"
        body.append([row["data"], few, row["method"], teacher, str(row["seeds"]), *shown])
    header = ["data", "labels", "method", "teacher normalizes by", "seeds", "student", "teacher", "student, kNN"]
    return rows([*header, "teacher, kNN"], body)


def ema_update(report: dict[str, Any]) -> str:
    """What an update of the average costs, by library."""
    names = {
        "ours": "`EMANTeacher`",
        "timm": "timm",
        "torch": "torch",
        "loop": "a Python loop",
        "lightning": "Lightning",
    }
    body = []
    for case in report["cases"]:
        shares = [f"{100 * case['share_of_step'][key]:.2f}" for key in names]
        body.append([case["network"], case["device"], f"{case['seconds']['step']:.2f}", *shares])
    return rows(["network", "device", "seconds per step", *names.values()], body)


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {
    "accuracy": accuracy,
    "step_cost": step_cost,
    "solve": solve,
    "kernel": kernel,
    "leave_one_out": leave_one_out,
    "congruence": congruence,
    "ema_update": ema_update,
    "eman": eman,
    "label_errors": label_errors,
    "unique_information": unique_information,
    "summarize": summarize,
    "training_time": training_time,
    "forget": forget,
    "forget_read_outs": forget_read_outs,
    "mixed_privacy": mixed_privacy,
    "outlook": outlook,
    "shots": shots,
    "adapt": adapt,
    "second_order": second_order,
}
SOURCES = {"forget_read_outs": "forget", "outlook": "accuracy", "shots": "accuracy"}  # others are named after results


def render(text: str) -> str:
    """The README with all tables written anew."""
    for name, table in TABLES.items():
        results = ROOT / "benchmarks" / "results" / f"{SOURCES.get(name, name)}.json"
        head, tail = f"<!-- table: {name} -->\n", "<!-- end -->"
        if not results.exists() and head not in text:
            continue  # measured later
        report = json.loads(results.read_text())
        before, mark, rest = text.partition(head)
        _, end, after = rest.partition(tail)
        if not (mark and end):
            raise SystemExit(f"README.md has no place for the table {name}: it needs {head.strip()} and {tail}")
        text = f"{before}{head}{table(report)}\n{tail}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
