"""What a linearized training step costs, next to ordinary fine-tuning of the same network on the same batch.

A step is forward pass, squared loss, backward pass and clearing the gradients; the optimizer, which is the same for
both, is left out, and the K-FAC preconditioner is reported beside. Ordinary fine-tuning keeps batch normalization in
evaluation mode too. Both run in one process in rotating order; a ratio is the median of the ratios of the rounds. On a
CPU, time is that of the process with one thread, so that other programs do not count; memory is the peak of live tensor
bytes over the level at entry, from the allocator's events (gradients included). "ordinary" has activations that keep
their input, "in_place" those that overwrite it.

    python benchmarks/step_cost.py [--quick] [--output FILE]  # the last line printed is one JSON object
"""

import argparse
import copy
import gc
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
import torchvision
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from lqf_lightning.linear import LinearizedModel, fit_kfac

CLASSES = 10
Step = Callable[[], None]


def build_resnet(name: str, in_place: bool) -> nn.Module:
    """Build a torchvision ResNet with leaky activations and non-trivial statistics."""
    torch.manual_seed(0)
    model = getattr(torchvision.models, name)(num_classes=CLASSES)
    for module in list(model.modules()):
        for key, child in module.named_children():
            if isinstance(child, nn.ReLU):
                setattr(module, key, nn.LeakyReLU(0.1, inplace=in_place))
    return settle(model)


def build_lite(in_place: bool) -> nn.Module:
    """Build timm's EfficientNet-Lite0 (ReLU6, as published always in place)."""
    torch.manual_seed(0)
    model = timm.create_model("tf_efficientnet_lite0", num_classes=CLASSES)
    for module in model.modules():
        if isinstance(module, nn.ReLU6):
            module.inplace = in_place
    return settle(model)


def settle(model: nn.Module) -> nn.Module:
    """Give batch normalization statistics and affine parameters that a fold cannot ignore."""
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.uniform_(module.bias, -0.2, 0.2)
            module.momentum = 0.5
    model.train()
    with torch.no_grad():
        for _ in range(3):
            model(torch.randn(8, 3, 64, 64))
    return model.eval()


def make_step(model: nn.Module, x: Tensor, target: Tensor, autocast: bool) -> Step:
    """Forward, squared loss, backward, clear."""

    def step() -> None:
        with torch.autocast(x.device.type, torch.bfloat16, enabled=autocast):
            output = model(x)
        (0.5 * (output.float() - target).square().sum(1).mean()).backward()
        model.zero_grad(set_to_none=True)

    return step


def clock(device: str) -> float:
    """Read the process's CPU time, or the wall clock of a finished GPU."""
    if device == "cuda":
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def time_rounds(steps: dict[str, Step], rounds: int, device: str) -> dict[str, list[float]]:
    """Time every step once per round, starting with another one each round."""
    for step in steps.values():
        step()
    names, times = list(steps), {name: [] for name in steps}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            start = clock(device)
            steps[name]()
            times[name].append(clock(device) - start)
    return times


def peak_bytes(step: Step, device: str) -> int:
    """Peak of live tensor bytes above the level at entry."""
    step()
    gc.collect()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        base = torch.cuda.memory_allocated()
        step()
        return torch.cuda.max_memory_allocated() - base
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as recorded:
        step()
    events = [e for e in recorded.profiler.kineto_results.events() if e.name() == "[memory]"]
    level = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        level += event.nbytes()
        peak = max(peak, level)
    return peak


def measure(
    build: Callable[[bool], nn.Module], size: int, batch: int, rounds: int, *, device: str = "cpu",
    autocast: bool = False, channels_last: bool = False, kfac: bool = False,
) -> dict[str, Any]:  # fmt: skip
    """Compare ordinary and linearized steps of one network and input size."""
    torch.manual_seed(1)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    x = torch.randn(batch, 3, size, size, device=device).to(memory_format=layout)
    target = 15.0 * torch.eye(CLASSES, device=device)[torch.arange(batch, device=device) % CLASSES]
    ordinary = {
        key: build(flag).to(device, memory_format=layout) for key, flag in (("ordinary", False), ("in_place", True))
    }
    network = copy.deepcopy(ordinary["ordinary"])
    linear = LinearizedModel(network, example=x[:2])
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for name, delta in linear.deltas.items():
            noise = torch.randn(delta.shape, generator=generator).to(delta.device)
            delta.copy_(noise * 0.05 * network.get_parameter(name).norm() / noise.norm())
    models: dict[str, nn.Module] = {**ordinary, "linear": linear}
    steps = {name: make_step(model, x, target, autocast) for name, model in models.items()}
    times = time_rounds(steps, rounds, device)
    memory = {name: peak_bytes(step, device) for name, step in steps.items()}
    result: dict[str, Any] = {
        "size": size, "batch": batch, "rounds": rounds, "mode": linear.mode,
        "seconds": {name: statistics.median(values) for name, values in times.items()},
        "ratio": ratio(times, "linear", "ordinary"),
        "ratio_to_in_place": ratio(times, "linear", "in_place"),
        "peak_mib": {name: value / 2**20 for name, value in memory.items()},
        "memory_ratio": memory["linear"] / memory["ordinary"],
        "memory_ratio_to_in_place": memory["linear"] / memory["in_place"],
    }  # fmt: skip
    if kfac:
        result["kfac"] = measure_kfac(linear, x, steps["linear"], device)
    return result


def ratio(times: dict[str, list[float]], of: str, to: str) -> float:
    """Median of the per-round ratios."""
    return statistics.median(a / b for a, b in zip(times[of], times[to], strict=True))


def measure_kfac(linear: LinearizedModel, x: Tensor, step: Step, device: str) -> dict[str, float]:
    """Cost of the preconditioner: fitting it to one batch, and one application in linearized steps."""
    start = clock(device)
    fitted = fit_kfac(linear, None, [x], damping=1e-3, cotangents="random", form="reduce")
    seconds = clock(device) - start
    gradients = {name: torch.randn_like(delta) for name, delta in linear.deltas.items()}

    def apply() -> None:
        fitted.precondition(gradients)

    times = time_rounds({"apply": apply, "step": step}, 3, device)
    return {"apply_in_steps": ratio(times, "apply", "step"), "fit_seconds": seconds}


def run(quick: bool) -> dict[str, Any]:
    """Measure all cases of this machine."""
    cases: dict[str, dict[str, Any]] = {}

    def resnet18(in_place: bool) -> nn.Module:
        return build_resnet("resnet18", in_place)

    def add(name: str, build: Callable[[bool], nn.Module], size: int, batch: int, rounds: int, **options: Any) -> None:
        cases[name] = measure(build, size, batch, rounds, **options)
        print(name, json.dumps(cases[name]), flush=True)

    if quick:
        add("resnet18_32", resnet18, 32, 8, 3)
        add("lite0_32", build_lite, 32, 8, 3)
    else:
        add("resnet18_64", resnet18, 64, 32, 15, kfac=True)
        add("resnet18_224", resnet18, 224, 8, 9)
        add("lite0_96", build_lite, 96, 16, 15)
    if torch.cuda.is_available():
        size, batch, rounds = (64, 8, 3) if quick else (224, 64, 20)
        for layout in (False, True):
            name = f"resnet50_{size}_bf16_cuda" + ("_channels_last" if layout else "")
            add(name, lambda flag: build_resnet("resnet50", flag), size, batch, rounds,
                device="cuda", autocast=True, channels_last=layout)  # fmt: skip
    return {
        "benchmark": "step_cost", "quick": quick, "cases": cases, "claims": [] if quick else claims(cases),
        "torch": torch.__version__, "torchvision": torchvision.__version__, "timm": timm.__version__,
        "python": platform.python_version(), "machine": platform.machine(), "cpu": cpu_name(),
        "cuda": torch.cuda.get_device_name() if torch.cuda.is_available() else None, "threads": torch.get_num_threads(),
    }  # fmt: skip


def claims(cases: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    """Hold the figures against what the documentation promises."""
    targets = [
        ("ResNet-18, 64 px: linearized over ordinary step, time", "resnet18_64", "ratio", 1.75),
        ("ResNet-18, 224 px: linearized over ordinary step, time", "resnet18_224", "ratio", 1.75),
        ("EfficientNet-Lite0, 96 px: linearized over ordinary step, time", "lite0_96", "ratio", 2.1),
        ("ResNet-18, 64 px: linearized over ordinary step, peak memory", "resnet18_64", "memory_ratio", 1.15),
        ("ResNet-18, 224 px: linearized over ordinary step, peak memory", "resnet18_224", "memory_ratio", 1.0),
    ]
    return [
        {"claim": text, "value": cases[case][key], "target": target, "holds": cases[case][key] <= target}
        for text, case, key, target in targets
    ]


def cpu_name() -> str:
    """Name of the processor, as Linux tells it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def main() -> None:
    """Run the cases that this machine allows and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: fewer rounds, smaller inputs, no claims")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    report = json.dumps(run(options.quick), indent=None)
    if options.output:
        options.output.parent.mkdir(parents=True, exist_ok=True)
        options.output.write_text(report + "\n")
    print(report)


if __name__ == "__main__":
    main()
