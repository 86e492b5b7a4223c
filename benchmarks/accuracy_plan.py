"""What the accuracy benchmark runs: image sets, rows of the table, and how fine-tuning is tuned."""

import argparse
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

RATES = (0.001, 0.003, 0.01, 0.03)  # of fine-tuning, the best by validation accuracy
SHOTS, DRAWS = (1, 5, 10), 1  # images per class, and how often they are drawn
EPOCHS = 15
LINEAR = ("method=lqf", "trainer.max_epochs=20")


@dataclass(frozen=True)
class ImageSet:
    """Images, and the augmentation that suits them.

    Attributes:
        name: For the table.
        data: Hydra overrides.
        augmentation: For stochastic methods.
    """

    name: str
    data: tuple[str, ...]
    augmentation: str


@dataclass(frozen=True)
class Row:
    """A row of the table.

    Attributes:
        name: For the table.
        overrides: Of Hydra.
        seeds: How many seeds it gets.
        augmented: Whether it trains on augmented images.
        observe: Callbacks beside the learning curves.
    """

    name: str
    overrides: tuple[str, ...]
    seeds: int = 1
    augmented: bool = False
    observe: tuple[str, ...] = field(default=())


def image_sets(options: argparse.Namespace) -> Iterator[ImageSet]:
    """The sets of the command line, the digits first.

    Args:
        options: With `folder` (NAME=PATH:SIZE[:AUGMENTATION[:SHARE]]) and `size`.

    Yields:
        Image sets.
    """
    if options.digits:
        yield ImageSet("digits", ("data=digits", f"data.image_size={options.size}", "data.subset_ratio=0.65"), "shift")
    for entry in options.folder:
        name, _, rest = entry.partition("=")
        path, size, *more = rest.split(":")
        augmentation, share, crop = (*more, *("crop_flip", "1", "1")[len(more) :])
        data = (
            "data=folder", f"data.source.root={Path(path).absolute()}", f"data.image_size={size}",
            f"data.subset_ratio={share}", f"data.crop_fraction={crop}",
        )  # fmt: skip
        yield ImageSet(name, data, augmentation)


def rows(leaky: Path | None) -> Mapping[str, Row]:
    """What is compared, beside fine-tuning.

    Args:
        leaky: Weights of a network with leaky activations, from `lqf-adapt`.

    Returns:
        Rows by key, those of the headline first.
    """
    sgd = ("method=lqf_sgd", "trainer.max_epochs=10", "data.batch_size=64")
    plain = ("method.preconditioner=null", "method.optimizer.lr=2")
    result = {
        "learned": Row("LQF, learned penalty", LINEAR, 3, observe=("linear_probe", "learned_penalty")),
        "head": Row("LQF, head only", (*LINEAR, "method.layers=[head]"), 3),
        "identity": Row("LQF, one ridge", (*LINEAR, "method.metric=identity", "method.acceleration=trace")),
        "gaf": Row("plain linearization (GaF)", (*sgd, *plain, "method.loss=cross_entropy"), augmented=True),
        "recipe": Row("LQF, published recipe", sgd, augmented=True),
        "no_kfac": Row("published recipe without K-FAC", (*sgd, *plain), augmented=True),
        "block": Row("LQF, penalty by block", (*LINEAR, "method.penalty_by=block")),
        "relinearized": Row("LQF, two more expansions", (*LINEAR[:1], "trainer.max_epochs=60", "method.relinearize=2")),
        "copies": Row("LQF, three copies", (*LINEAR, "data.copies=3"), augmented=True),
        "cross_entropy": Row("published recipe, cross-entropy", (*sgd, "method.loss=cross_entropy"), augmented=True),
    }
    if leaky is not None:
        options = ("backbone.leaky_slope=0.1", f"backbone.weights={leaky.absolute()}")
        result["leaky"] = Row("LQF, learned penalty, leaky", (*LINEAR, *options), 1, observe=("linear_probe",))
    return result


def finetune(rate: float, epochs: int, data: ImageSet) -> tuple[str, ...]:
    """The overrides of ordinary fine-tuning.

    Args:
        rate: Learning rate.
        epochs: Number of epochs.
        data: The image set.

    Returns:
        Overrides of Hydra.
    """
    return (
        "method=finetune", f"data/augmentation={data.augmentation}", "data.batch_size=32",
        f"trainer.max_epochs={epochs}", f"method.optimizer.lr={rate:g}", "method.optimizer.nesterov=true",
    )  # fmt: skip
