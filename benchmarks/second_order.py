"""What second-order pooling is worth to a linear classifier, by the size of the images and the kind of the classes.

One network without training (EfficientNet-Lite0, ImageNet weights from pip), the same ridge regression on the features
of each pooling, the ridge chosen by cross-validation on the training images. Without `--folder` it takes the digits
that scikit-learn brings, which need no download.

    python benchmarks/second_order.py [--quick] [--folder NAME=PATH:CLASSES ...] [--sizes 64,96,128,224]
                                      [--widths 32,64,128] [--output benchmarks/results/second_order.json]

PATH holds `train` and `test`, with a folder per class each, of which the first CLASSES are taken. The last line printed
is one JSON object.
"""

import argparse
import math
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from second_order_parts import Images, class_folders, digits, score_probe
from torch import Tensor
from written_report import write_report

from lqf_lightning.backbones import Backbone, create_backbone
from lqf_lightning.backbones.pool_second_order import Pooling

CHUNK = 32
DEFAULT_WIDTH = 128  # of backbone.pooling_width


def last_maps(images: Images, side: int) -> tuple[list[Tensor], float]:
    """The network's last feature maps of both parts, in chunks, and the milliseconds per image that they took."""
    model: Any = make(images, side, "average", 64).model
    start = time.process_time()
    with torch.no_grad():
        parts = [
            torch.cat([model.forward_features(x) for x in torch.split(prepare(part, side), CHUNK)])
            for part in (images.train, images.test)
        ]
    return parts, 1e3 * (time.process_time() - start) / sum(map(len, parts))


def make(images: Images, side: int, pooling: Pooling, width: int) -> Backbone:
    """The network with a pooling."""
    return create_backbone(
        "tf_efficientnet_lite0", images.classes, weights="package", image_size=side, pooling=pooling,
        pooling_width=width,
    )  # fmt: skip


def measure(images: Images, maps: list[Tensor], side: int, pooling: Pooling, width: int) -> dict[str, Any]:
    """Accuracy of a ridge probe on the features of one pooling, and what the features cost."""
    model: Any = make(images, side, pooling, width).model
    start = time.process_time()
    with torch.no_grad():
        train, test = (
            torch.cat([model.forward_head(x, pre_logits=True) for x in torch.split(part, CHUNK)]) for part in maps
        )
    milliseconds = 1e3 * (time.process_time() - start) / (len(train) + len(test))
    found: dict[str, Any] = score_probe(train, images.train_target, test, images.test_target, images.classes)
    sizes = {"features": train.shape[1], "squared_norm": train.square().sum(1).mean().item()}
    return found | sizes | {"pooling_ms": milliseconds}


def prepare(pixels: Tensor, side: int) -> Tensor:
    """Resize 8-bit images, and shift them to the network's input."""
    values = pixels.float() / 255
    if values.shape[-1] != side:
        values = F.interpolate(values, size=(side, side), mode="bicubic", antialias=True).clamp(0, 1)
    return (values - 0.5) / 0.5


def run_set(name: str, images: Images, sizes: list[int], widths: list[int]) -> list[dict[str, Any]]:
    """All poolings at all sizes."""
    kinds: list[tuple[Pooling, int]] = [("average", 64)]
    for width in widths:
        kinds += [("second_order", width), ("both", width)]
    rows: list[dict[str, Any]] = []
    for side in sizes:
        maps, milliseconds = last_maps(images, side)
        case = {
            "data": name, "classes": images.classes, "train": len(images.train), "test": len(images.test),
            "image_size": side, "places": maps[0].shape[-1] ** 2, "network_ms": milliseconds,
        }  # fmt: skip
        for pooling, width in kinds:
            chosen = {"pooling": pooling} | ({} if pooling == "average" else {"width": width})
            rows.append(case | chosen | measure(images, maps, side, pooling, width))
            print(rows[-1], flush=True)
    return rows


def claims(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What the documentation says: at the default width, both together are not behind the average alone."""
    average = {(r["data"], r["image_size"]): r["test_acc"] for r in rows if r["pooling"] == "average"}
    told = []
    for row in (row for row in rows if row["pooling"] == "both" and row["width"] == DEFAULT_WIDTH):
        alone = average[row["data"], row["image_size"]]
        noise = math.sqrt(alone * (1 - alone) / row["test"])
        told.append({
            "claim": f"{row['data']}, {row['image_size']} px, width {row['width']}: gain of both over average in test "
            "accuracy, not below minus one standard error",
            "value": row["test_acc"] - alone, "target": -noise, "holds": row["test_acc"] - alone >= -noise,
        })  # fmt: skip
    return told


def main() -> None:
    """Run all cases and print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a smoke run: 100 digits at 64 pixels, no claims")
    parser.add_argument("--folder", action="append", default=[], help="NAME=PATH:CLASSES of a tree with train and test")
    parser.add_argument("--sizes", default="64,96,128,224", help="sides in pixels")
    parser.add_argument("--widths", default="32,64,128", help="directions of the covariance")
    parser.add_argument("--output", type=Path, help="also write the JSON there")
    options = parser.parse_args()
    torch.set_num_threads(1)
    sizes, widths = ([int(number) for number in text.split(",")] for text in (options.sizes, options.widths))
    if options.quick:
        sizes, widths = [64], [32]
    sets = {"digits": digits(100 if options.quick else 600)} if options.quick or not options.folder else {}
    for entry in [] if options.quick else options.folder:
        name, _, rest = entry.partition("=")
        path, _, count = rest.rpartition(":")
        sets[name] = class_folders(Path(path), int(count))
    rows = [row for name, images in sets.items() for row in run_set(name, images, sizes, widths)]
    write_report(
        {"benchmark": "second_order", "quick": options.quick, "rows": rows,
         "claims": [] if options.quick else claims(rows)}, options.output,
    )  # fmt: skip


if __name__ == "__main__":
    main()
