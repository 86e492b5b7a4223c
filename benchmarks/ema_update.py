"""What one update of an averaged teacher costs, beside one training step and beside what other libraries take.

After every training step (forward, cross-entropy, backward, SGD) of one network, all averages of it are updated once,
in an order that rotates; figures are medians over the steps, of processor time on a CPU (one thread) and of
synchronized wall time on a GPU. Competitors:

* loop: ``mul_`` and ``add_`` over the entries of the state dict, in Python;
* torch: ``AveragedModel(use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(m))``;
* timm: ``ModelEmaV3``;
* lightning: ``AveragedModel(use_buffers=True, avg_fn=get_ema_avg_fn(m))``, which is what Lightning's callback
  ``EMAWeightAveraging`` builds and updates; without the hooks around it.

    python benchmarks/ema_update.py [--quick] [--output FILE]

On a CPU images have 96 pixels: larger ones make steps longer and updates no dearer.
With --quick they have so few that a share of the step means nothing, and is not claimed. The last line printed is one
JSON object.
"""

import argparse
import copy
import datetime
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
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from lqf_lightning.teachers import EMANTeacher
from lqf_lightning.teachers.paired_state import pair_states

MOMENTUM = 0.999
TARGETS = {"cpu": 0.03, "cuda": 0.01}  # of a training step
NOT_SLOWER = 1.2  # than the fastest of the others


def build(name: str) -> nn.Module:
    """A network with random weights."""
    torch.manual_seed(0)
    network: nn.Module = torchvision.models.resnet50() if name == "resnet50" else timm.create_model(name)
    return network


def python_loop(student: nn.Module) -> Callable[[], None]:
    """What one writes first."""
    average = copy.deepcopy(student).eval().requires_grad_(False)

    @torch.no_grad()
    def update() -> None:
        for own, other in zip(average.state_dict().values(), student.state_dict().values(), strict=True):
            if own.is_floating_point():
                own.mul_(MOMENTUM).add_(other, alpha=1 - MOMENTUM)
            else:
                own.copy_(other)

    return update


def averaged_model(student: nn.Module, **options: Any) -> Callable[[], None]:
    """Torch's average, past its first call, which copies."""
    average = AveragedModel(student, use_buffers=True, **options)
    average.update_parameters(student)
    return lambda: average.update_parameters(student)


def updates(student: nn.Module) -> dict[str, Callable[[], Any]]:
    """Every way to update an average of the student; and the part of ours that pairs tensors by name."""
    teacher = EMANTeacher(student, MOMENTUM)
    timm_average = ModelEmaV3(student, decay=MOMENTUM)
    return {
        "ours": teacher.update,
        "loop": python_loop(student),
        "torch": averaged_model(student, multi_avg_fn=get_ema_multi_avg_fn(MOMENTUM)),
        "timm": lambda: timm_average.update(student),
        "lightning": averaged_model(student, avg_fn=get_ema_avg_fn(MOMENTUM)),
        "pairing alone": lambda: pair_states(teacher.model, student),
    }


def seconds(work: Callable[[], Any], device: str) -> float:
    """Time of one call."""
    if device == "cpu":
        began = time.process_time()
        work()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def training_step(student: nn.Module, device: str, batch: int, side: int, precision: str) -> Callable[[], None]:
    """One step of a supervised training on a fixed batch."""
    images = torch.randn(batch, 3, side, side, device=device)
    target = torch.randint(1000, (batch,), device=device)
    optimizer = torch.optim.SGD(student.parameters(), lr=0.01, momentum=0.9)

    def step() -> None:
        with torch.autocast(device, dtype=torch.bfloat16, enabled=precision == "bf16 autocast"):
            loss: Tensor = F.cross_entropy(student(images), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def bytes_moved(student: nn.Module) -> int:
    """What an update has to read and write: both copies of a float and one write, one of each for an integer."""
    return sum(
        value.numel() * value.element_size() * (3 if value.is_floating_point() else 2)
        for value in student.state_dict().values()
    )


def measure(name: str, device: str, batch: int, side: int, precision: str, steps: int) -> dict[str, Any]:
    """Medians for one network."""
    student = build(name).to(device).train()
    step, ways = training_step(student, device, batch, side, precision), updates(student)
    spent: dict[str, list[float]] = {"step": [], **{way: [] for way in ways}}
    for number in range(steps + 1):
        once = {"step": seconds(step, device)}
        order = list(ways)
        for way in order[number % len(order) :] + order[: number % len(order)]:
            once[way] = seconds(ways[way], device)
        if number:  # the first step allocates
            for part, value in once.items():
                spent[part].append(value)
    median = {part: statistics.median(values) for part, values in spent.items()}
    fastest = min(("loop", "torch", "timm", "lightning"), key=median.__getitem__)
    moved = bytes_moved(student)
    return {
        "network": name, "device": device, "batch": batch, "side": side, "precision": precision, "steps": steps,
        "seconds": median, "share_of_step": {way: median[way] / median["step"] for way in ways},
        "fastest_other": fastest, "over_fastest_other": median["ours"] / median[fastest],
        "pairing_share_of_update": median["pairing alone"] / median["ours"],
        "megabytes_moved": moved / 1e6, "gigabytes_per_second": moved / 1e9 / median["ours"],
    }  # fmt: skip


def claims(result: dict[str, Any]) -> list[dict[str, Any]]:
    """What is promised of one network."""
    where = f"{result['network']}, {result['device']}, {result['precision']}"
    share, ratio, target = result["share_of_step"]["ours"], result["over_fastest_other"], TARGETS[result["device"]]
    return [
        {"claim": f"update over training step: {where}", "value": share, "target": target, "holds": share <= target},
        {
            "claim": f"update over that of the fastest other ({result['fastest_other']}): {where}",
            "value": ratio, "target": NOT_SLOWER, "holds": ratio <= NOT_SLOWER,
        },
    ]  # fmt: skip


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    batch, side, steps = (64, 224, 60) if device == "cuda" else (32, 96, 18)
    if arguments.quick:
        batch, side, steps = 4, 32, 6
    precisions = ["fp32", "bf16 autocast"] if device == "cuda" else ["fp32"]
    networks = ["tf_efficientnet_lite0"] if arguments.quick else ["resnet50", "tf_efficientnet_lite0"]
    cases = [measure(name, device, batch, side, p, steps) for name in networks for p in precisions]
    report = {
        "benchmark": "ema_update", "date": datetime.date.today().isoformat(), "quick": arguments.quick,
        "torch": torch.__version__,
        "machine": torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine(),
        "cases": cases, "claims": [claim for result in cases for claim in claims(result)[arguments.quick :]],
    }  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
