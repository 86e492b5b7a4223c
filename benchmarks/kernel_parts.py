"""The measured parts of `kernel.py`: the networks, their images, and time and memory of assembling a kernel."""

import math
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from images_from_folder import load_folder
from step_cost import Step, build_resnet, clock, make_step, peak_bytes
from torch import Tensor, nn

from lqf_lightning.backbones import create_backbone
from lqf_lightning.linear import Kernel, LinearizedModel, assemble_kernel
from lqf_lightning.linear.kernel_layers import KernelLayer

CLASSES, BATCH = 10, 32
Groups = Mapping[str, Sequence[str]]
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

    KernelLayer.choose = chosen  # type: ignore[method-assign]  # put back below
    try:
        yield
    finally:
        KernelLayer.choose = choose  # type: ignore[method-assign]  # as it was before


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
