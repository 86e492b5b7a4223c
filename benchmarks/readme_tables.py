"""Writes the README's tables from the committed benchmark results.

    python benchmarks/readme_tables.py

Each table stands between ``<!-- table: NAME -->`` and ``<!-- end -->`` and comes from ``benchmarks/results/NAME.json``.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent


def rows(header: list[str], body: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *body]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def accuracy(report: dict[str, Any]) -> str:
    """Test accuracy by network and data set."""
    body = []
    for case, by_method in report["cases"].items():
        backbone, data = case.split("/")
        values = [by_method["lqf"]["probe_test_acc"], by_method["lqf"]["test_acc"], by_method["finetune"]["test_acc"]]
        best = max(values)
        body.append([data, backbone, *(f"**{v:.3f}**" if v == best else f"{v:.3f}" for v in values)])
    return rows(["data", "backbone", "linear probe", "LQF", "fine-tuning"], body)


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


TABLES: dict[str, Callable[[dict[str, Any]], str]] = {"accuracy": accuracy, "step_cost": step_cost}


def render(text: str) -> str:
    """The README with all tables written anew."""
    for name, table in TABLES.items():
        report = json.loads((ROOT / "benchmarks" / "results" / f"{name}.json").read_text())
        head, tail = f"<!-- table: {name} -->\n", "<!-- end -->"
        before, mark, rest = text.partition(head)
        _, end, after = rest.partition(tail)
        if not (mark and end):
            raise SystemExit(f"README.md has no place for the table {name}: it needs {head.strip()} and {tail}")
        text = f"{before}{head}{table(report)}\n{tail}{after}"
    return text


if __name__ == "__main__":
    readme = ROOT / "README.md"
    readme.write_text(render(readme.read_text()))
