"""Set-ups in which nothing can be compared, told apart before the first batch."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only, rank_zero_warn

from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.answers import answers
from lqf_lightning.data.seen_in_training import seen_in_training
from lqf_lightning.teachers import Reference, SharedClasses, StoredPredictions

log = logging.getLogger(__name__)


def check_options(reference: Any, references: Mapping[str, Any] | None, max_images: int) -> None:
    """Check the options of `NegativeFlips`.

    Args:
        reference: The model in use, or None.
        references: Several, by name, or None.
        max_images: How many flips are shown.

    Raises:
        ValueError: There is no model to compare with, a name makes no file name, or a number is negative.
    """
    if reference is None and not references:
        raise ValueError("negative flips need a model to compare with. Set reference=RUN/checkpoints/best.ckpt")
    odd = [name for name in references or {} if not name or "/" in name or "\\" in name]
    if odd:
        raise ValueError(
            f"references of negative flips are called {odd}, expected names without slashes. Set "
            "callbacks.negative_flips.references={old: RUN/checkpoints/best.ckpt}"
        )
    if max_images < 0:
        raise ValueError(f"max_images must be at least 0, got {max_images}. Set callbacks.negative_flips.max_images=32")


def data_of(trainer: Trainer) -> ImageDataModule:
    """The data module of a run, which has to tell samples by index.

    Args:
        trainer: The running trainer.

    Returns:
        The data module.

    Raises:
        TypeError: It is another kind, or there is none.
    """
    data = getattr(trainer, "datamodule", None)
    if not isinstance(data, ImageDataModule):
        raise TypeError(
            f"negative flips need an ImageDataModule, whose manifest tells which sample is which, got {data!r}. Set "
            "data=folder, or callbacks=[learning_curves]"
        )
    return data


def classes_of(module: LightningModule) -> list[str]:
    """Class names of the model of this run.

    Args:
        module: A `Method`; Lightning's hooks promise no more than a LightningModule.

    Returns:
        The names, in the order of its outputs.
    """
    classes: list[str] = module.classes  # type: ignore[assignment]  # see above
    return classes


def refuse_strangers(references: Mapping[str, Reference], module: LightningModule) -> None:
    """Check that every old model shares classes with the model of this run.

    Args:
        references: Old models.
        module: The model of this run.
    """
    for reference in references.values():
        SharedClasses(classes_of(module), reference.classes)


def doubts(data: ImageDataModule, references: Mapping[str, Reference], split: str) -> list[str]:
    """Say what rates on a split do not show: classes that are not compared, and images that an old model has learned.

    Args:
        data: The data of this run; images are hashed where the samples of an old run are known.
        references: Old models.
        split: The split that is evaluated.

    Returns:
        Sentences, for the log of the first process.
    """
    found = []
    for reference in references.values():
        if difference := SharedClasses(data.classes, reference.classes).difference():
            found.append(f"negative flips of {reference.name}: {difference}")
        for member in () if isinstance(reference, StoredPredictions) else reference.members:
            if member.manifest is None:
                continue
            data.manifest.hash_contents()
            if number := seen_in_training(data.manifest, split, member.manifest):
                remedy = f". Set data.manifest={member.manifest} to hold out what its run held out"
                found.append(
                    f"negative flips: {member.name} was trained on {number} of the {len(data.manifest.rows(split))} "
                    f"{split} images: its errors there, and the flips, are not those on new images"
                    f"{remedy if split == 'val' and member.classes == data.classes else ''}"
                )
    return found


def foresee_the_test(data: ImageDataModule, references: Mapping[str, Reference]) -> None:
    """Say before training if stored predictions will not do for the test; whether there will be one is not known.

    Args:
        data: The data.
        references: Old models.
    """
    if data.test_split == "val":
        return
    for reference in references.values():
        if isinstance(reference, StoredPredictions):
            try:
                answers(data, reference, "test")
            except ValueError as error:
                rank_zero_warn(f"negative flips: a test would fail, set test=false to leave it out: {error}")


@rank_zero_only
def say_that_nothing_is_validated() -> None:
    """Say, once, that training will report no flips."""
    log.info("negative flips: nothing is validated in this run, so they are counted in the test only")
