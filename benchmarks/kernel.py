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
import math
import platform
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from images_from_folder import load_folder
from step_cost import Step, build_resnet, clock, cpu_name, make_step, peak_bytes
from torch import Tensor, nn

from lqf_lightning.backbones import create_backbone
from lqf_lightning.linear import Kernel, LinearizedModel, assemble_kernel
from lqf_lightning.linear.kernel_layers import KernelLayer

CLASSES, BATCH = 10, 32
Groups = Mapping[str, Sequence[str]]
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
FORMS: dict[str, dict[str, Any]] = {
    "full": {"form": "full"},
    "diagonal": {"form": "diagonal"},
    "trace": {"form": "trace"},
    "trace_2_combinations": {"form": "trace", "combinations": 2},
    "last_layer": {"form": "last_layer"},
}


class Bench:
    """Sizes, device and images of a run."""

    def __init__(self, size: dict[str, Any], data: Path | None) -> None:
        self.size, self.data = size, data
        self.device = "cuda" if torch.cuda.is_available() else "cpu"

    def resnet(self, samples: int | None = None) -> tuple[LinearizedModel, Tensor]:
        """ResNet-18 and noise."""
        torch.manual_seed(1)
        x = torch.randn(samples or self.size["n"], 3, self.size["side"], self.size["side"], device=self.device)
        return LinearizedModel(build_resnet("resnet18", False).to(self.device), example=x[:2]), x

    def lite(self, samples: int, outputs: int = CLASSES) -> tuple[LinearizedModel, Tensor, Groups]:
        """EfficientNet-Lite0 with images, and its layer groups."""
        torch.manual_seed(0)
        side = self.size["side"]
        backbone = create_backbone("tf_efficientnet_lite0", outputs, weights="package", image_size=side)
        if self.data is None:
            x = torch.randn(samples, 3, side, side)
        else:
            x, _ = load_folder(self.data / "dtd10" / "train", samples, side, backbone.mean, backbone.std)
        x = x.to(self.device)
        return LinearizedModel(backbone.model.to(self.device), example=x[:2]), x, backbone.groups


def assemble(
    model: LinearizedModel, groups: Groups, x: Tensor, batch: int = BATCH, **options: Any
) -> tuple[Kernel, dict[str, float]]:
    """Assemble a kernel; the seconds of its phases come from what it hands to the progress bar."""
    seconds = {"collect": 0.0, "gram": 0.0}

    def watch(items: Iterable[Any]) -> Iterator[Any]:
        begin, phase = clock(x.device.type), "gram"
        for item in items:
            phase = "collect" if isinstance(item, Tensor) else "gram"
            yield item
        seconds[phase] += clock(x.device.type) - begin

    start = clock(x.device.type)
    kernel = assemble_kernel(model, groups, x.split(batch), watch=watch, **options).train
    return kernel, {**seconds, "total": clock(x.device.type) - start}


def medians(records: Sequence[dict[str, float]]) -> dict[str, float]:
    """Median of every entry."""
    return {key: statistics.median(record[key] for record in records) for key in records[0]}


def ordinary_step(model: LinearizedModel, x: Tensor) -> Step:
    """A step of ordinary training of the network at its initial weights."""
    torch.manual_seed(2)
    network = build_resnet("resnet18", False).to(x.device)
    return make_step(network, x, torch.randn(len(x), CLASSES, device=x.device), False)


def plain_backwards(network: nn.Module, x: Tensor) -> Step:
    """One evaluation and a backward pass per output for the input: what collecting cannot do without."""

    def step() -> None:
        start = x.clone().requires_grad_()
        output = network(start)
        for direction in torch.eye(output.shape[1], device=x.device):
            torch.autograd.grad(output, start, direction.expand_as(output), retain_graph=True)

    return step


def collect(bench: Bench) -> dict[str, Any]:
    """Collecting, per 32 samples, next to an ordinary training step of 32 samples; rounds take turns."""
    model, images = bench.resnet()
    x = images[:BATCH]
    weights = [name for name in model.names if model.model.get_parameter(name).ndim > 1]
    step, floor = ordinary_step(model, x), plain_backwards(build_resnet("resnet18", False).to(x.device).eval(), x)
    step()
    records = []
    for _ in range(bench.size["rounds"] + 1):
        record = {}
        for name, run in (("step", step), ("backwards", floor)):
            start = clock(bench.device)
            run()
            record[name] = clock(bench.device) - start
        found = assemble(model, {"all": model.names}, x)[1]
        record |= {"collect": found["collect"], "gram": found["gram"]}
        record["collect_weights"] = assemble(model, {"all": weights}, x, form="diagonal")[1]["collect"]
        records.append(record)
    records = records[1:]  # the first one warms up
    ratios = medians([{key: record[key] / record["step"] for key in record} for record in records])
    return {"samples": len(x), "rounds": len(records), "seconds": medians(records), "in_steps": ratios}


@contextmanager
def explicit_only() -> Iterator[None]:
    """Take inner products of all layers from explicit rows."""
    choose = KernelLayer.choose

    def chosen(layer: KernelLayer, form: Any, cotangents: int, samples: int) -> KernelLayer:
        return replace(choose(layer, form, cotangents, samples), gram="explicit")

    KernelLayer.choose = chosen  # type: ignore[method-assign]
    try:
        yield
    finally:
        KernelLayer.choose = choose  # type: ignore[method-assign]


def gram(bench: Bench) -> dict[str, Any]:
    """The choice layer by layer against explicit rows everywhere, in time, memory and value."""
    model, x = bench.resnet()
    kernels: dict[str, Tensor] = {}
    figures: dict[str, Any] = {"samples": len(x)}

    def run(name: str) -> dict[str, float]:
        kernel, seconds = assemble(model, {"all": model.names}, x)
        kernels[name] = kernel.total()
        return seconds

    figures["auto"] = measure(lambda: run("auto"), bench.device)
    with explicit_only():
        figures["explicit"] = measure(lambda: run("explicit"), bench.device)
    figures["relative_difference"] = distance(kernels["auto"], kernels["explicit"])
    parameters = sum(delta.numel() for delta in model.deltas.values())
    figures["jacobian_mib"] = len(x) * CLASSES * parameters * 4 / 2**20
    few = x[: bench.size["check"]]
    rows = jacobian_gram(model, few)
    figures["auto_to_backward_passes"] = distance(assemble(model, {"all": model.names}, few)[0].total(), rows)
    with explicit_only():
        figures["explicit_to_backward_passes"] = distance(assemble(model, {"all": model.names}, few)[0].total(), rows)
    return figures


def measure(run: Callable[[], dict[str, float]], device: str, rounds: int = 1) -> dict[str, float]:
    """Seconds of the phases, and the peak of memory in a further run."""
    found = [run() for _ in range(rounds - 1)]
    peak = peak_bytes(lambda: found.append(run()), device)
    return {**medians(found[:rounds]), "peak_mib": peak / 2**20}


def jacobian_gram(model: LinearizedModel, x: Tensor) -> Tensor:
    """The kernel from rows of the Jacobian, one plain backward pass for each."""
    network = model.model.eval()
    leaves = [network.get_parameter(name).detach().clone().requires_grad_() for name in model.names]
    rows = []
    for sample in x:
        output = torch.func.functional_call(network, dict(zip(model.names, leaves, strict=True)), (sample[None],))[0]
        rows += [torch.autograd.grad(entry, leaves, retain_graph=True) for entry in output]
    parts = [torch.stack([row[place].flatten() for row in rows]).double() for place in range(len(leaves))]
    return sum((part @ part.T for part in parts), torch.zeros((), device=x.device))[None]


def distance(one: Tensor, other: Tensor) -> float:
    """Relative, in the Frobenius norm."""
    return float((one - other).norm() / other.norm())


def forms(bench: Bench) -> dict[str, Any]:
    """Time and memory of the forms."""
    model, x, groups = bench.lite(bench.size["n"])
    head = {"head": groups["head"]}
    assemble(model, groups, x[:2])
    return {
        name: measure(
            lambda o=options, g=head if name == "last_layer" else groups: assemble(model, g, x, **o)[1],
            bench.device,
            bench.size["rounds"],
        )
        for name, options in FORMS.items()
    }  # fmt: skip


def diagonal(bench: Bench) -> dict[str, Any]:
    """Diagonal and full form of ResNet-18 with more samples, when forming rows weighs little."""
    model, x = bench.resnet(4 * bench.size["n"])
    runs = {name: assemble(model, {"all": model.names}, x, **FORMS[name])[1] for name in ("full", "diagonal")}
    return {"samples": len(x), **runs}


def grow(bench: Bench, cases: Mapping[int, tuple[LinearizedModel, Tensor, Groups]]) -> dict[str, Any]:
    """Time the full kernel of every case, in batches of one size and rounds taking turns, and fit exponents."""
    records: dict[int, list[dict[str, float]]] = {key: [] for key in cases}
    rounds = min(bench.size["rounds"], 3)
    batch = min(min(len(x) for _, x, _ in cases.values()), BATCH)
    model, x, groups = next(iter(cases.values()))
    assemble(model, groups, x, batch)
    for _ in range(rounds):
        for key, (model, x, groups) in cases.items():
            records[key].append(assemble(model, groups, x, batch)[1])
    seconds = {key: medians(found) for key, found in records.items()}
    return {
        "rounds": rounds,
        "seconds": seconds,
        "exponents": {
            phase: slope(list(seconds), [entry[phase] for entry in seconds.values()]) for phase in ("collect", "gram")
        },
    }


def slope(x: Sequence[float], y: Sequence[float]) -> float:
    """Slope of the line through logarithms, by least squares."""
    fit = statistics.linear_regression([math.log(value) for value in x], [math.log(value) for value in y])
    return fit.slope


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
