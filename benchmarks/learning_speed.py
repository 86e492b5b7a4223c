"""What the callback `learning_speed` adds to training, for two networks.

Within one fit, epochs with and without the callback's hooks alternate on the same images; processor time is taken from
the first hook of an epoch to the last, all batches and the end of the epoch included, and the first two epochs are left
out. The ratio is the median of those of neighboring epochs, which the load of a shared machine changes alike.

    python benchmarks/learning_speed.py [--quick] [--repeats N] [--output FILE]

Images are random: what they show takes no part in what a step costs. The last line printed is one JSON object.
"""

import argparse
import datetime
import json
import statistics
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, Trainer, seed_everything
from lqf_lightning.callbacks.learning_speed import LearningSpeed
from PIL import Image

from lqf_lightning.backbones import create_backbone
from lqf_lightning.data import FolderSource, ImageDataModule
from lqf_lightning.methods import Finetune
from lqf_lightning.train import prepare_process

TARGET = 1.03
NETWORKS = {
    "lite0 64 px": ("tf_efficientnet_lite0", 64, "timm"),
    "resnet18 32 px": ("resnet18", 32, "timm"),
}


class Sometimes(LearningSpeed):
    """Looks at every second epoch only."""

    def on_train_batch_end(self, trainer: Any, *others: Any) -> None:
        """Look, or do nothing."""
        if trainer.current_epoch % 2:
            super().on_train_batch_end(trainer, *others)


class Stopwatch(Callback):
    """Notes when epochs begin, if it is the first callback, or how long they took, if it is the last."""

    def __init__(self, first: "Stopwatch | None" = None) -> None:
        self.first, self.began, self.spent = first, 0.0, {0: [], 1: []}

    def on_train_epoch_start(self, *_: Any) -> None:
        """Begin."""
        self.began = time.process_time()

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        """End."""
        if self.first is not None and trainer.current_epoch > 1:
            self.spent[trainer.current_epoch % 2].append(time.process_time() - self.first.began)


def write_images(root: Path, side: int, per_class: int, classes: int = 10) -> None:
    """Noise, a folder per class."""
    generator = torch.Generator().manual_seed(0)
    for part, number in (("train", per_class), ("test", 1)):
        for label in range(classes):
            folder = root / part / f"class{label}"
            folder.mkdir(parents=True)
            for position in range(number):
                pixels = torch.randint(0, 256, (side, side, 3), generator=generator).byte().numpy()
                Image.fromarray(pixels).save(folder / f"{position}.png")


def epochs(name: str, side: int, library: str, per_class: int, repeats: int, folder: Path) -> dict[int, list[float]]:
    """Seconds of epochs without (0) and with (1) the callback."""
    seed_everything(0, verbose=False)
    write_images(folder / "images", side, per_class)
    data = ImageDataModule(
        FolderSource(folder / "images"), image_size=side, crop_fraction=1.0, batch_size=64, num_workers=0,
        val_fraction=0, cache_images=True,
    )  # fmt: skip
    data.setup()
    backbone = create_backbone(name, data.num_classes, library=library, weights=None, image_size=side)
    data.normalization = (backbone.mean, backbone.std)
    method = Finetune(backbone, data.classes, optimizer=partial(torch.optim.SGD, lr=1e-3))
    first = Stopwatch()
    last = Stopwatch(first)
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=2 + 2 * repeats, callbacks=[first, Sometimes(top=1), last],
        logger=False, limit_val_batches=0, use_distributed_sampler=False, num_sanity_val_steps=0,
        enable_checkpointing=False, enable_model_summary=False, enable_progress_bar=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(method, datamodule=data)
    return last.spent


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    torch.set_num_threads(1)
    per_class, repeats = (13, 2) if arguments.quick else (64, arguments.repeats)
    report: dict[str, Any] = {
        "benchmark": "learning_speed", "date": datetime.date.today().isoformat(), "networks": {}, "claims": [],
    }  # fmt: skip
    for label, (name, side, library) in NETWORKS.items():
        with tempfile.TemporaryDirectory() as folder:
            seconds = epochs(name, side, library, per_class, repeats, Path(folder))
        ratio = statistics.median(one / other for one, other in zip(seconds[1], seconds[0], strict=True))
        report["networks"][label] = {"ratio": ratio, "seconds_with": seconds[1], "seconds_without": seconds[0]}
        text = f"training with learning_speed over training without, {label}"
        report["claims"].append({"claim": text, "value": ratio, "target": TARGET, "holds": ratio <= TARGET})
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
