"""The head that a configuration asks for: as the backbone has it, fitted to core images, or kept by an earlier run."""

import inspect
import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import hydra
import torch
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, OmegaConf, open_dict
from torch import Tensor

from lqf_lightning._launch import is_many_processes
from lqf_lightning.backbones import Backbone
from lqf_lightning.data import ImageDataModule
from lqf_lightning.fitted_head import FILE, FittedHead, core_rows, fit_head
from lqf_lightning.methods import MixedPrivacy

log = logging.getLogger(__name__)
_RANDOM = ("random", None)


def give_head(config: DictConfig, backbone: Backbone, data: ImageDataModule) -> frozenset[str]:
    """Give the network the head that `head` says, before a method linearizes it.

    What was fitted is kept in the run folder, and `head` becomes the name of that file: a run that is opened again
    reads it, beside its manifest, and fits nothing.

    Args:
        config: The composed configuration: `head` is random (whatever the backbone brings: drawn, or loaded with its
            weights), core, or a file that a run has kept. Changed in place.
        backbone: The network, changed in place.
        data: The data, set up, with the normalization of the network.

    Returns:
        Hashes of the images whose labels the head knows.

    Raises:
        ValueError: The head is of other classes, or cannot be fitted or used here.
    """
    choice = config.get("head")
    if choice in _RANDOM:
        return frozenset()
    kept, scale = Path(config.paths.output_dir) / FILE, target_scale(config)
    file = None if choice == "core" else _find(config, str(choice), kept)
    if choice == "core":
        refuse_fitting(config, backbone, data)
        with _alike(config):
            head = fit_head(backbone, data, _device(config))
        _tell(head, scale)
    elif file is None:
        return frozenset()
    else:
        head = FittedHead.read(file)
    if sorted(head.classes) != sorted(data.classes):
        raise ValueError(f"head={choice} tells {list(head.classes)} apart, the data have {data.classes}. Set head=core")
    head.put_into(backbone, scale, data.classes)
    if file is None or file.absolute() != kept.absolute():
        rank_zero_only(head.write)(kept)
    with open_dict(config):
        config.head = FILE
    return head.contents


def resumed_head(config: DictConfig, folder: Path) -> None:
    """Let a run go on with the head that it began with.

    Args:
        config: The composed configuration, changed in place.
        folder: Folder of the run that wrote the checkpoint.

    Raises:
        ValueError: It began with another.
    """
    choice, kept = config.get("head"), folder / FILE
    if kept.is_file() != (choice not in _RANDOM):
        began = f"a fitted head, {kept}" if kept.is_file() else "no fitted head"
        raise ValueError(
            f"{folder} holds a run that began with {began}, which cannot go on with head={choice}. Set "
            f"head={'core' if kept.is_file() else 'random'}, or ckpt_path=null to start over"
        )
    if kept.is_file():
        config.head = str(kept)


@rank_zero_only
def forget_head(folder: Path) -> None:
    """Clear the head that an earlier run left in the folder.

    Args:
        folder: The run folder.
    """
    (folder / FILE).unlink(missing_ok=True)


def refuse_fitting(config: DictConfig, backbone: Backbone, data: ImageDataModule) -> None:
    """Check that there is a core, that a method starts from the head, and that no loaded one would be overwritten.

    Args:
        config: The composed configuration.
        backbone: The network, with its weights.
        data: The data, set up.

    Raises:
        ValueError: A fitted head would be of no use, or do harm.
    """
    method: Any = hydra.utils.get_object(config.method._target_)
    if not getattr(method, "head_is_trained", True):
        raise ValueError(f"head=core: {method.__name__} trains no classifier to start from. Set head=random")
    if isinstance(method, type) and issubclass(method, MixedPrivacy) and config.data.get("part") != "user":
        raise ValueError(
            "head=core makes the head part of the core weights, which must not know what the run trains on, got "
            f"data.part={config.data.get('part')}. Set data.part=user"
        )
    bias: Tensor | None = getattr(backbone.model.get_submodule(backbone.head), "bias", None)
    if bias is not None and bool(bias.any()):  # that of a head that was drawn is zero
        raise ValueError(
            f"backbone.weights={config.backbone.get('weights')} brought a head for these classes, which head=core "
            "would overwrite. Set head=random to keep that one, or backbone.weights to a file without a head for them"
        )
    _refuse_core(data)


def target_scale(config: DictConfig) -> float | None:
    """What outputs of a method are fitted to.

    Args:
        config: The composed configuration.

    Returns:
        The value of the right class in its squared loss; None: outputs are logits.
    """
    scale, loss = _option(config, "target_scale"), _option(config, "loss")
    return None if scale is None or loss not in (None, "squared") else float(scale)


def _option(config: DictConfig, name: str) -> Any:
    if name in config.method:
        return config.method[name]
    known = inspect.signature(hydra.utils.get_object(config.method._target_)).parameters.get(name)
    return None if known is None or known.default is known.empty else known.default


def _find(config: DictConfig, choice: str, kept: Path) -> Path | None:
    # The name alone was written by a run: its folder is where its manifest lies, wherever it has been moved since.
    manifest = OmegaConf.select(config, "data.manifest")
    places = [Path(choice).expanduser()]
    if choice == FILE:
        places = [*([] if manifest is None else [Path(manifest).parent / FILE]), kept]
    found = next((place for place in places if place.is_file()), None)
    if found is None and choice == FILE and OmegaConf.select(config, "backbone.weights") is None:
        log.info("the head that the run was given is not at %s: that of the checkpoint is taken", places[0])
        return None  # weights that are all to come from a checkpoint
    return places[0] if found is None else found


def _device(config: DictConfig) -> torch.device:
    asked, devices = str(config.trainer.get("accelerator", "auto")), config.trainer.get("devices")
    if asked not in ("gpu", "cuda", "auto") or not torch.cuda.is_available():
        return torch.device("cpu")
    local = int(os.environ.get("LOCAL_RANK", "0"))
    listed = OmegaConf.is_list(devices) and len(devices) > local
    return torch.device("cuda", int(devices[local]) if listed else local)


@rank_zero_only
def _tell(head: FittedHead, scale: float | None) -> None:
    log.info(
        "head=core: ridge probe on %d core images, leave-one-out accuracy %.3f (ridge %.0e of the features' variance), "
        "times %.3g%s. It knows the labels of these images",
        len(head.contents), head.accuracy, head.ridge, head.steepness if scale is None else scale,
        " as logits" if scale is None else ", the target of the right class",
    )  # fmt: skip


def _refuse_core(data: ImageDataModule) -> None:
    rows, classes = core_rows(data), data.classes
    images, present = len(rows), rows["class"].nunique()
    if not images:
        raise ValueError(
            "head=core fits the head to the labeled images of data.core, got none. Set data.core={fraction:0.5,seed:0} "
            "data.part=user to fit it to one half and train on the other, or head=random"
        )
    if present < 2:
        raise ValueError(
            f"head=core fits the head to the images of data.core, got {images} of {present} class, expected several. "
            "Set data.core={fraction:0.5,seed:0}, which takes some of every class, or head=random"
        )
    if present < len(classes):
        rank_zero_only(log.warning)(
            "head=core: data.core has no labeled image of %d of %d classes, which the head will not name. Set "
            "data.core={fraction:0.5,seed:0} for some of every class",
            len(classes) - present, len(classes),
        )  # fmt: skip


@contextmanager
def _alike(config: DictConfig) -> Iterator[None]:
    # Lightning gives its processes different numbers of threads, and rounding would differ with them.
    threads = torch.get_num_threads()
    if is_many_processes(config.trainer.get("devices", "auto"), config.trainer.get("num_nodes", 1)):
        torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
