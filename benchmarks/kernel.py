"""What assembling the tangent kernel costs: in steps of ordinary training, in bytes, and how it grows.

ResNet-18 (leaky activations, random weights, 64 px): noting inputs and cotangents ("collect"), and the inner products
("gram") with the choice of the method layer by layer, against explicit rows everywhere, with the same code; and both
against Jacobian rows from plain backward passes, for a few samples. EfficientNet-Lite0: the cost of the kernel's forms,
and how it grows with samples n, outputs k and parameters P, all other things equal; exponents are slopes of straight
lines through logarithms. Time is that of the process with one thread on a CPU, so that other programs do not count, the
wall clock on a GPU; a figure is the median over rounds. Rows that are formed while collecting count there. Memory is
the peak of live tensor bytes over the level at entry. Finished parts are kept in the work folder.

    python benchmarks/kernel.py [--quick | --full] [--data DIR] [--work DIR] [--output FILE]

DIR holds dtd10/train/CLASS/*.png for EfficientNet-Lite0; without it, its images are noise, which costs the same. The
last line printed is one JSON object.
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
import torchvision
from kernel_parts import Bench, collect, diagonal, forms, gram, grow
from step_cost import cpu_name

SIZES: dict[str, dict[str, Any]] = {
    "quick": {"side": 32, "n": 8, "rounds": 1, "grow_n": [4, 8], "grow_k": [2, 5], "stages": [2, 10], "check": 1},
    "default": {
        "side": 64, "n": 32, "rounds": 5, "grow_n": [16, 32, 64, 128], "grow_k": [2, 5, 10],
        "stages": [1, 2, 3, 4, 5, 6, 10], "check": 3,
    },
    "full": {
        "side": 64, "n": 128, "rounds": 5, "grow_n": [64, 128, 256, 512], "grow_k": [2, 5, 10, 20],
        "stages": [1, 2, 3, 4, 5, 6, 10], "check": 3,
    },
}  # fmt: skip


def grow_samples(bench: Bench) -> dict[str, Any]:
    """In n."""
    model, x, groups = bench.lite(max(bench.size["grow_n"]))
    return grow(bench, {n: (model, x[:n], groups) for n in bench.size["grow_n"]})


def grow_outputs(bench: Bench) -> dict[str, Any]:
    """In k."""
    return grow(bench, {k: bench.lite(bench.size["n"], k) for k in bench.size["grow_k"]})


def grow_parameters(bench: Bench) -> dict[str, Any]:
    """In P: the last stages, one more each time; the first entry of the groups is nearest to the image."""
    model, x, groups = bench.lite(bench.size["n"])
    cases = {}
    for count in bench.size["stages"]:
        chosen = dict(list(groups.items())[-count:])
        parameters = sum(model.deltas[name].numel() for names in chosen.values() for name in names)
        cases[parameters] = (model, x, chosen)
    return grow(bench, cases)


PARTS: dict[str, Callable[[Bench], dict[str, Any]]] = {
    "resnet18_collect": collect,
    "resnet18_gram": gram,
    "resnet18_diagonal": diagonal,
    "lite0_forms": forms,
    "lite0_samples": grow_samples,
    "lite0_outputs": grow_outputs,
    "lite0_parameters": grow_parameters,
}


def claims(parts: Mapping[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    steps, products, found = parts["resnet18_collect"]["in_steps"], parts["resnet18_gram"], parts["lite0_forms"]
    more = parts["resnet18_diagonal"]
    auto, explicit = products["auto"], products["explicit"]
    samples, outputs = parts["lite0_samples"]["exponents"], parts["lite0_outputs"]["exponents"]
    whole = steps["collect"] + steps["gram"]
    return [
        _claim("ResNet-18: collect over ordinary step, 32 samples each", steps["collect"], 4.0),
        _claim("ResNet-18: the same, weights of convolutions and head alone", steps["collect_weights"], 4.0),
        _claim("ResNet-18: collect and gram of 32 samples in ordinary steps", whole, 19.1),
        _claim("ResNet-18: gram over gram of explicit rows", auto["gram"] / explicit["gram"], 0.12),
        _claim("ResNet-18: relative difference of these two", products["relative_difference"], 1e-3),
        _claim("ResNet-18: the same to products of plain backward passes", products["auto_to_backward_passes"], 1e-5),
        _claim("ResNet-18: peak memory over the Jacobian's", auto["peak_mib"] / products["jacobian_mib"], 0.1),
        _claim("ResNet-18: peak memory over that of explicit rows", auto["peak_mib"] / explicit["peak_mib"], 1.0),
        _claim(
            f"ResNet-18, {more['samples']} samples: gram of the diagonal form over full",
            more["diagonal"]["gram"] / more["full"]["gram"],
            0.25,
        ),
        _claim("Lite0: gram of the diagonal form over full", found["diagonal"]["gram"] / found["full"]["gram"], 0.5),
        _claim(
            "Lite0: trace by two combinations over full, collect and gram",
            found["trace_2_combinations"]["total"] / found["full"]["total"],
            0.4,
        ),
        _claim("Lite0: last layer over full", found["last_layer"]["total"] / found["full"]["total"], 0.1),
        _claim("Lite0: exponent of collect in the number of samples", samples["collect"], 1.1),
        _claim("Lite0: exponent of gram in the number of samples", samples["gram"], 2.0),
        _claim("Lite0: exponent of collect in the number of outputs", outputs["collect"], 1.0),
        _claim("Lite0: exponent of gram in the number of outputs", outputs["gram"], 2.0),
    ]


def _claim(text: str, value: float, target: float) -> dict[str, Any]:
    return {"claim": text, "value": value, "target": target, "holds": value <= target}


def run(size: str, data: Path | None, work: Path) -> dict[str, Any]:
    """Take all parts, those kept from before included."""
    bench, parts = Bench(SIZES[size], data), {}
    work.mkdir(parents=True, exist_ok=True)
    for name, function in PARTS.items():
        file = work / f"{name}.json"
        if not file.exists():
            file.write_text(json.dumps(function(bench)))
        parts[name] = json.loads(file.read_text())
        print(name, json.dumps(parts[name]), flush=True)
    gpu = torch.cuda.get_device_name() if bench.device == "cuda" else None
    return {
        "benchmark": "kernel", "size": size, "sizes": SIZES[size], "parts": parts,
        "claims": [] if size == "quick" else claims(parts),
        "machine": gpu or f"{cpu_name()}, one thread, shared with other programs", "date": str(datetime.date.today()),
        "torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__,
        "python": platform.python_version(),
    }  # fmt: skip


def main() -> None:
    """Run all parts and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run of a few images, no claims")
    parser.add_argument("--full", action="store_true", help="for a GPU: more samples")
    parser.add_argument("--data", type=Path, help="folder with dtd10/train; without it, images are noise")
    parser.add_argument("--work", type=Path, default=Path("runs/kernel"), help="where finished parts are kept")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    size = "quick" if options.quick else "full" if options.full else "default"
    report = json.dumps(run(size, options.data, options.work / size))
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
