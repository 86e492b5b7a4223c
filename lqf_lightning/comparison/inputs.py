"""What `lqf-compare` compares: two models, and the images that both see."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from lqf_lightning._instantiate import instantiate
from lqf_lightning.comparison.option_errors import errors_of
from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.seen_in_training import seen_in_training as count_seen
from lqf_lightning.references import matching_paths, open_reference
from lqf_lightning.resume import keep_indices, make_paths_absolute, run_config
from lqf_lightning.teachers import FrozenTeacher, Reference, StoredPredictions

_FILES = (".ckpt", ".parquet")


@dataclass(frozen=True)
class Side:
    """One of the two models.

    Attributes:
        role: "old" or "new", the option that names it.
        checkpoints: The files of runs among what the option names, in its order.
        model: The model, or its stored predictions.
    """

    role: str
    checkpoints: list[Path]
    model: Reference


def open_side(config: DictConfig, role: str, classes: Sequence[str]) -> Side:
    """Open one of the two models.

    Args:
        config: The composed configuration.
        role: "old" or "new".
        classes: Class names of the data.

    Returns:
        The model and the files that it comes from.
    """
    with errors_of(role, config[role]):
        return Side(role, checkpoints_of(config[role], role), open_reference(config[role], classes))


def networks_of(side: Side) -> tuple[FrozenTeacher, ...]:
    """Tell the networks of a model.

    Args:
        side: One of the two models.

    Returns:
        The members of an ensemble, that of the first checkpoint first, or the one network; none for stored predictions.
    """
    if isinstance(side.model, StoredPredictions):
        return ()
    members = tuple(side.model.members)
    if len(members) == 1 or len(side.checkpoints) != len(members):
        return members
    first = open_reference(side.checkpoints[0]).fingerprint  # members are sorted otherwise
    return tuple(sorted(members, key=lambda member: member.fingerprint != first))


def name_absolutely(config: DictConfig) -> None:
    """Make the written configuration name the same models from every directory.

    Args:
        config: The composed configuration, changed in place.
    """
    for role in ("old", "new"):
        named = OmegaConf.create({"reference": config[role]})
        make_paths_absolute(named)
        config[role] = named.reference


def checkpoints_of(spec: Any, role: str) -> list[Path]:
    """Find the checkpoints that an option names.

    Args:
        spec: What `open_reference` takes.
        role: "old" or "new", for messages.

    Returns:
        Absolute paths, in the order of the option; none for names of libraries and stored predictions.

    Raises:
        FileNotFoundError: A file is missing.
    """
    if isinstance(spec, (list, tuple, ListConfig)):
        return [path for entry in spec for path in checkpoints_of(entry, role)]
    if not isinstance(spec, (str, Path)):
        return []
    with errors_of(role, spec):
        paths = [Path(text).expanduser().absolute() for text in matching_paths(spec)]
    for path in paths:
        inside, is_file = sorted(path.glob("checkpoints/*.ckpt")), path.is_file()
        if inside or (path.suffix in _FILES and not is_file):
            near = [str(found) for found in inside or sorted(path.parent.glob(f"*{path.suffix}"))]
            raise FileNotFoundError(
                f"{role}={path} is no file of a model; found {near or 'none near it'}. Set "
                f"{role}=RUN/checkpoints/best.ckpt"
            )
    return [path for path in paths if path.suffix == ".ckpt"]


def open_data(config: DictConfig) -> tuple[DictConfig, ImageDataModule]:
    """List the images: those of the new model's run, unless others are given.

    Args:
        config: The composed configuration.

    Returns:
        The configuration of the data, under `data`, and the data module, set up.

    Raises:
        ValueError: There is neither a run nor other data.
    """
    chosen = OmegaConf.create({"seed": config.seed, "paths": config.paths, "data": config.data})
    checkpoints_of(config.old, "old")  # a missing file is told before images are listed
    checkpoints = checkpoints_of(config.new, "new")
    if "_target_" not in config.data:
        if not checkpoints:
            raise ValueError(
                f"new={config.new} is no checkpoint in a run folder, from which the data could be known. Set "
                "data=folder data.source.root=PATH"
            )
        run = run_config(checkpoints[0])
        chosen = OmegaConf.create({"seed": run.seed, "data": OmegaConf.merge(run.data, config.data)})
        if "source" not in config.data:
            chosen.data.manifest = None  # that of the run, wherever its folder has been moved since
            keep_indices(chosen, checkpoints[0].parent.parent)
    make_paths_absolute(chosen)
    data: ImageDataModule = instantiate(chosen, "data")
    data.prepare_data()
    data.setup()
    return chosen, data


def refuse_incomparable(data: ImageDataModule, split: str, old: Side, new: Side) -> None:
    """Check that there are images on which the two can be compared.

    Args:
        data: The data module, set up.
        split: "val" or "test".
        old: The old model.
        new: The new model.

    Raises:
        ValueError: There are no such samples, or none of a class that both know, or stored predictions lack some.
    """
    rows = data.manifest.rows(split)
    if not len(rows):
        other = "split=val" if split == "test" else "split=test, or +data.val_fraction=0.1"
        raise ValueError(f"the data have no {split} samples. Set {other}, or another data=...")
    shared = set(old.model.classes) & set(new.model.classes)
    if not shared & set(rows["class"]):
        raise ValueError(
            f"no {split} image belongs to a class that both models know: the old one knows {old.model.classes[:5]}..., "
            f"the new one {new.model.classes[:5]}..., the data hold {list(data.classes)[:5]}... Set old, new or data "
            "to those of the same classes; they are matched by name"
        )
    for side in (old, new):
        if isinstance(side.model, StoredPredictions):
            data.manifest.hash_contents()
            rows = data.manifest.rows(split)
            with errors_of(side.role, side.model.name):
                side.model.check(rows["index"].tolist(), rows["sha"].tolist(), split)


def seen_in_training(data: ImageDataModule, splits: Sequence[str], sides: Sequence[Side]) -> list[str]:
    """Find images that are to be held out, but that a model was trained on, by content.

    Args:
        data: The data module, with hashed images.
        splits: The splits to look at.
        sides: The models.

    Returns:
        A sentence per split and model that has seen some.
    """
    sentences = []
    for side in sides:
        manifests = [path.parent.parent / "manifest.parquet" for path in side.checkpoints]
        for split in splits:
            if number := count_seen(data.manifest, split, *filter(Path.is_file, manifests)):
                sentences.append(
                    f"The {side.role} model was trained on {number} of the {len(data.manifest.rows(split))} {split} "
                    "images: its errors there, and the flips, are not those on new images."
                )
    return sentences
