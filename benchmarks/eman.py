"""What averaging the teacher's normalization brings: few labels (FixMatch) and none (MoCo, BYOL), on real images.

Every number comes from runs of `lqf-train` in processes of their own, with one thread. Teachers differ in nothing but
their batch-norm statistics: averaged (eman), those of their own batches (ema), or the student's (ema_copied); FixMatch
also runs without a teacher, and there is fine-tuning on the labeled images alone. No labeled image is held out: the
last checkpoint counts. Finished runs are kept in the work folder, so that an interrupted measurement goes on. Options
were chosen by test accuracy with another draw of labels (seed 0) than those that are reported (seeds 1, 2, ...).

    python benchmarks/eman.py --data DIR [--part few_labels ...] [--quick | --full] [--work DIR] [--seeds N]
        [--until SECONDS] [--output FILE] [OVERRIDE ...]

DIR holds folders cifar10, cars50 and dtd10, each with train/CLASS/*.png and test/CLASS/*.png; further overrides, such
as trainer=gpu, are given to every run. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import platform
import resource
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from eman_figures import claims, rows

TEACHERS = ("eman", "ema", "ema_copied")
SIZES: dict[str, dict[str, Any]] = {
    "quick": {"share": 0.04, "side": 32, "labels": [4], "steps": 4, "epochs": 1, "tenth": 2},
    "default": {"share": 1.0, "side": 48, "labels": [4, 25], "steps": 300, "epochs": 8, "tenth": 300},
    "full": {"share": 1.0, "side": 96, "labels": [4, 25], "steps": 20000, "epochs": 400, "tenth": 10000},
}  # `share` of the training images; `steps` of FixMatch, `tenth` with a tenth of the labels; `epochs` without labels


@dataclass(frozen=True)
class Job:
    """One run.

    Attributes:
        name: Its folder.
        facts: What the table says of it.
        overrides: Of `lqf-train`.
        after: Name of the run whose network it starts from.
    """

    name: str
    facts: dict[str, Any]
    overrides: tuple[str, ...]
    after: str | None = None


def few_labels(data: Path, size: dict[str, Any], seeds: int) -> Iterator[Job]:
    """FixMatch from ImageNet weights, by number of labels per class and by teacher."""
    for labels in size["labels"]:
        shared = (
            *_data(data / "cifar10", size["side"]), f"data.subset_ratio={size['share']}",
            f"data.labels_per_class={labels}",
        )  # fmt: skip
        yield from _semi_supervised("cifar10", labels, shared, size["steps"], (*TEACHERS, "null"), seeds)


def tenth_of_labels(data: Path, size: dict[str, Any], seeds: int) -> Iterator[Job]:
    """FixMatch against fine-tuning on a tenth of the labels: of cars, which are hard to tell apart, and textures."""
    for name, teachers in (("cars50", ("eman", "ema")), ("dtd10", ("eman",))):
        shared = (*_data(data / name, 64), "data.label_fraction=0.1")
        yield from _semi_supervised(name, 0.1, shared, size["tenth"], teachers, seeds)


def no_labels(data: Path, size: dict[str, Any], seeds: int) -> Iterator[Job]:
    """MoCo and BYOL from random weights, by teacher; then a linear probe on what student and teacher have learned."""
    network = ("backbone=resnet18", "backbone.weights=null", "backbone.image_size=32")
    images = (*_data(data / "cifar10", 32), f"data.subset_ratio={size['share']}")
    options = {
        "moco": (
            "method.queue_size=2048", "method.optimizer.lr=0.06",
        ),
        "byol": ("method.optimizer.lr=0.3", "method.hidden_width=512"),
    }  # fmt: skip
    watched = ("trainer.max_epochs=1", "data.batch_size=64", "data.val_fraction=0.1", "data/augmentation=none")
    for seed in range(1, seeds + 1):
        facts = {"data": "cifar10", "method": "untrained", "teacher": "none", "seed": seed}
        yield Job(f"no_labels/untrained_{seed}", facts, (
            *images, *network, "method=linear_probe", "callbacks=[linear_probe,knn]", f"seed={seed}", *watched,
        ))  # fmt: skip
        for method in ("moco", "byol"):
            for teacher in TEACHERS:
                name = f"no_labels/{method}_{teacher}_{seed}"
                facts = {"data": "cifar10", "method": method, "teacher": teacher, "seed": seed}
                yield Job(name, facts, (
                    *images, *network, "data.val_fraction=0.1", f"method={method}", f"method.teacher={teacher}",
                    f"seed={seed}",
                    f"trainer.max_epochs={size['epochs']}", "data.batch_size=64", "callbacks=[knn]",
                    f"callbacks.knn.every_n_epochs={size['epochs']}",
                    *options[method],
                ))  # fmt: skip
                for part in ("student", "teacher"):
                    yield Job(f"{name}_{part}", {**facts, "probe": part}, (
                        *images, *network[:1], network[2], "method=linear_probe", "callbacks=[linear_probe]", *watched,
                        f"backbone.weights={{}}@{part}",
                    ), name)  # fmt: skip


def _semi_supervised(
    data: str, labels: float, shared: tuple[str, ...], steps: int, teachers: tuple[str, ...], seeds: int
) -> Iterator[Job]:
    for seed in range(1, seeds + 1):
        common = (
            *shared, f"seed={seed}", f"data.label_seed={seed}", "method/optimizer=adamw", "method.optimizer.lr=0.001",
            "+trainer.max_steps=" + str(steps), "trainer.max_epochs=-1", "data/augmentation=crop_flip",
            "data.augmentation.scale=[0.6,1.0]", "backbone=efficientnet_lite0",
        )  # fmt: skip
        facts = {"data": data, "labels": labels, "seed": seed}
        for teacher in teachers:
            options = (
                "method=fixmatch", f"method.teacher={teacher}", "method.momentum=0.99", "method.momentum_warmup=true",
                "data.batch_size=10", "method.unlabeled_weight=1", "method.threshold=0.8",
            )  # fmt: skip
            name = f"{data}_{labels}/fixmatch_{teacher}_{seed}"
            yield Job(name, {**facts, "method": "fixmatch", "teacher": teacher}, (*common, *options))
        options = ("method=finetune", "method.teacher=eman", "method.momentum=0.99", "method.momentum_warmup=true")
        name = f"{data}_{labels}/finetune_{seed}"
        yield Job(name, {**facts, "method": "finetune", "teacher": "none"}, (*common, *options, "data.batch_size=20"))


def _data(folder: Path, side: int) -> tuple[str, ...]:
    return (
        "data=folder", f"data.source.root={folder}", f"data.image_size={side}", "data.crop_fraction=1.0",
        "data.num_workers=0", "data.eval_batch_size=128", "data.val_fraction=0", "data.cache_images=false",
        "checkpoints.best=null", "logger=[]", "callbacks=[]", "progress=none",
    )  # fmt: skip


PARTS = {"few_labels": few_labels, "tenth_of_labels": tenth_of_labels, "no_labels": no_labels}


def run(job: Job, work: Path, more: list[str]) -> dict[str, Any]:
    """Run a job, unless it has been run; its metrics and processor time."""
    folder = work / job.name
    result = folder / "benchmark.json"
    if not result.exists():
        overrides = [
            o.format(f"{work / str(job.after)}/checkpoints/last.ckpt") if job.after else o for o in job.overrides
        ]
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        command = [sys.executable, "-m", "lqf_lightning.train", *overrides, *more, f"hydra.run.dir={folder}"]
        subprocess.run(command, check=True, stdout=sys.stderr)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        metrics = json.loads((folder / "metrics.json").read_text())
        kept = {name: value for name, value in metrics.items() if "acc/" not in name}
        result.write_text(json.dumps({**job.facts, "seconds": seconds, "metrics": kept}))
        print(f"{job.name}: {seconds:.0f} s", file=sys.stderr, flush=True)
    return dict(json.loads(result.read_text()))


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--part", action="append", choices=list(PARTS))
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--until", type=float, default=float("inf"), help="begin no run after so many seconds")
    parser.add_argument("--work", type=Path, default=Path("eman_work"))
    parser.add_argument("--output", type=Path)
    parser.add_argument("overrides", nargs="*")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--quick", action="store_const", dest="size", const="quick", default="default")
    which.add_argument("--full", action="store_const", dest="size", const="full")
    arguments = parser.parse_intermixed_args()
    size, seeds = SIZES[arguments.size], 1 if arguments.size == "quick" else arguments.seeds
    started, results, complete = time.monotonic(), [], True
    for part in arguments.part or list(PARTS):
        for job in PARTS[part](arguments.data.absolute(), size, seeds):
            kept = (arguments.work.absolute() / job.name / "benchmark.json").exists()
            if kept or time.monotonic() - started < arguments.until:
                results.append(run(job, arguments.work.absolute(), arguments.overrides))
            else:
                complete = False
    report: dict[str, Any] = {
        "benchmark": "eman", "size": arguments.size, **size, "seeds": seeds, "complete": complete, "runs": results,
        "rows": rows(results), "claims": claims(results), "machine": platform.platform(),
        "versions": {"torch": torch.__version__, "timm": timm.__version__}, "date": datetime.date.today().isoformat(),
    }  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
