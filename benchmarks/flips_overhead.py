"""What the callback `negative_flips` adds to a validation, once the old model's predictions are in its cache.

Short fits with and without the callback alternate over the same validation images; the processor time of every
validation but each fit's first is taken from its first hook to its last. The ratio is that of the medians.

    python benchmarks/flips_overhead.py --data DIR [--quick] [--output FILE]

DIR holds train/CLASS/*.png and test/CLASS/*.png. The last line printed is one JSON object.
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
from lqf_lightning.callbacks import NegativeFlips

from lqf_lightning.backbones import create_backbone
from lqf_lightning.data import FolderSource, ImageDataModule
from lqf_lightning.methods import Finetune
from lqf_lightning.teachers import FrozenTeacher, View
from lqf_lightning.train import prepare_process

TARGET = 1.05


class Stopwatch(Callback):
    """Notes when validations begin, if it is the first callback, or how long they took, if it is the last."""

    def __init__(self, first: "Stopwatch | None" = None) -> None:
        self.first, self.began, self.spent = first, 0.0, []

    def on_validation_start(self, *_: Any) -> None:
        """Begin."""
        self.began = time.process_time()

    def on_validation_end(self, *_: Any) -> None:
        """End."""
        if self.first is not None:
            self.spent.append(time.process_time() - self.first.began)


def validations(data: Path, side: int, share: float, epochs: int, flips: bool, folder: Path) -> list[float]:
    """Seconds of every validation of a short fit, the first left out."""
    seed_everything(0, verbose=False)
    module = ImageDataModule(
        FolderSource(data), image_size=side, crop_fraction=1.0, batch_size=64, num_workers=0, val_fraction=share
    )
    module.setup()
    networks = [
        create_backbone("tf_efficientnet_lite0", module.num_classes, weights="package", image_size=side)
        for _ in range(2)
    ]
    old, new = networks
    module.normalization = (new.mean, new.std)
    view = View(side, 1.0, old.mean, old.std)
    teacher = FrozenTeacher(old.model, module.classes, view, "old", old)
    method = Finetune(new, module.classes, optimizer=partial(torch.optim.SGD, lr=1e-3))
    first = Stopwatch()
    last = Stopwatch(first)
    watched = [NegativeFlips(teacher, cache_dir=folder / "cache")] if flips else []
    trainer = Trainer(
        accelerator="cpu", devices=1, max_epochs=epochs, callbacks=[first, *watched, last], logger=False,
        limit_train_batches=1, use_distributed_sampler=False, num_sanity_val_steps=0, enable_checkpointing=False,
        enable_model_summary=False, enable_progress_bar=False, default_root_dir=folder,
    )  # fmt: skip
    trainer.fit(method, datamodule=module)
    return last.spent[1:]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    prepare_process()
    torch.set_num_threads(1)
    side, share, epochs, rounds = (32, 0.02, 3, 1) if arguments.quick else (64, 0.2, 4, 3)
    seconds: dict[bool, list[float]] = {True: [], False: []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(rounds):
            for flips in (True, False):  # the first of all fills the cache
                seconds[flips] += validations(arguments.data, side, share, epochs, flips, Path(folder))
    ratio = statistics.median(seconds[True]) / statistics.median(seconds[False])
    text = "validation with negative_flips over one without, once the old model's predictions are cached"
    report = {
        "benchmark": "flips_overhead", "date": datetime.date.today().isoformat(), "ratio": ratio, "side": side,
        "seconds_with": seconds[True], "seconds_without": seconds[False],
        "claims": [{"claim": text, "value": ratio, "target": TARGET, "holds": ratio <= TARGET}],
    }  # fmt: skip
    if arguments.output:
        arguments.output.write_text(json.dumps(report) + "\n")
    print(json.dumps(report))


if __name__ == "__main__":
    main()
