"""Models to compare with or to learn from, by the names that configurations give them."""

import glob
import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary

import torch
import torchvision
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from timm.data.imagenet_info import ImageNetInfo

from lqf_lightning._instantiate import instantiate
from lqf_lightning.backbones import Backbone, create_backbone
from lqf_lightning.backbones.library import find_architecture
from lqf_lightning.resume import run_config
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, Reference, StoredPredictions, View

log = logging.getLogger(__name__)
_IMAGENET = 1000
_open: WeakValueDictionary[tuple[str, int], FrozenTeacher] = WeakValueDictionary()


def open_references(config: DictConfig, key: str, classes: Sequence[str] | None = None) -> dict[str, Any]:
    """Open what a node's options `reference` and `references` name.

    Args:
        config: The whole configuration.
        key: Dotted name of the node of a method or callback.
        classes: Class names of the data.

    Returns:
        Arguments that replace these options; empty where the node has none, or they are null.
    """
    opened: dict[str, Any] = {}
    single, several = (OmegaConf.select(config, f"{key}.{name}") for name in ("reference", "references"))
    if single is not None and not _is_target(single):
        opened["reference"] = open_reference(single, classes)
    if several:
        opened["references"] = {str(name): open_reference(entry, classes) for name, entry in several.items()}
    return opened


def open_reference(spec: Any, classes: Sequence[str] | None = None) -> Reference:
    """Build a model from its name.

    Args:
        spec: A checkpoint in a run folder (``RUN/checkpoints/best.ckpt``), a pattern that matches several
            (``multirun/*/checkpoints/best.ckpt``), a Parquet file of predictions, a timm or torchvision name of an
            ImageNet classifier, a mapping of options of `create_backbone`, or a list of models: an ensemble, whose
            outputs are averaged.
        classes: Class names of the data, which tell by what names an ImageNet classifier's classes go.

    Returns:
        The model, or its stored predictions.

    Raises:
        ValueError: The list is empty, or has a member that has no outputs to average.
        TypeError: It is none of these.
    """
    if isinstance(spec, (list, tuple, ListConfig)):
        members = [member for entry in spec for member in _models(entry, classes)]
        return members[0] if len(members) == 1 else EnsembleTeacher(members)
    if isinstance(spec, (Mapping, DictConfig)):
        return _library_model({str(name): value for name, value in spec.items()}, classes)
    if not isinstance(spec, (str, Path)):
        raise TypeError(
            f"`reference` must be a name, a list or a mapping, got {spec!r}. Set reference=RUN/checkpoints/best.ckpt"
        )
    found = matching_paths(spec)
    if len(found) > 1:
        return open_reference(found, classes)
    path = Path(found[0]).expanduser().absolute()
    if path.suffix == ".parquet":
        return StoredPredictions.read(path, classes or ())
    if path.suffix == ".ckpt":
        return _checkpoint(path)
    if _looks_like_a_path(str(spec)):
        raise ValueError(_explain(path))
    return _library_model({"name": str(spec)}, classes)


def matching_paths(spec: Any) -> list[str]:
    """Expand lists of paths and patterns.

    Args:
        spec: A path, a pattern such as ``multirun/*/checkpoints/best.ckpt``, or a list of these; names of other things
            stay as they are.

    Returns:
        Paths and names; of a pattern those of all files that match, sorted. What exists is taken literally, even with
        brackets in its name.

    Raises:
        ValueError: No file matches a pattern.
    """
    if isinstance(spec, (list, tuple, ListConfig)):
        return [path for entry in spec for path in matching_paths(entry)]
    text = str(Path(spec).expanduser()) if str(spec).startswith("~") else str(spec)
    if not glob.has_magic(text) or Path(text).exists():
        return [text]
    found = sorted(glob.glob(text, recursive=True))
    if not found:
        raise ValueError(f"no file matches {text}. Set reference=RUN/checkpoints/best.ckpt")
    log.info("%s matches %d models", text, len(found))
    return found


def _looks_like_a_path(text: str) -> bool:
    return "/" in text or Path(text).suffix.lower() in (".csv", ".json", ".pt", ".pth", ".safetensors", ".onnx")


def _explain(path: Path) -> str:
    inside = sorted(path.glob("checkpoints/*.ckpt")) or sorted(path.glob("*.ckpt"))
    if inside:
        return f"{path} is a folder. Set reference={inside[0]}"
    what = "is neither a checkpoint (.ckpt) nor a Parquet file of predictions" if path.exists() else "does not exist"
    return (
        f"{path} {what}. Set reference=RUN/checkpoints/best.ckpt, or for weights alone "
        "'reference={name: resnet50, weights: FILE}'"
    )


def _models(entry: Any, classes: Sequence[str] | None) -> Iterable[FrozenTeacher]:
    opened = open_reference(entry, classes)
    if isinstance(opened, StoredPredictions):
        raise ValueError(
            f"{opened.name} holds predictions, which an ensemble cannot average. Set reference to this file alone, or "
            "to checkpoints"
        )
    return opened.members


def _checkpoint(path: Path) -> FrozenTeacher:
    # Method and callbacks name the same models: what one of them holds open, the others share.
    key = (str(path), path.stat().st_mtime_ns if path.is_file() else 0)
    known = _open.get(key)
    if known is None:
        known = _open[key] = _read_checkpoint(path)
    return known


def _read_checkpoint(path: Path) -> FrozenTeacher:
    try:
        run = run_config(path)
    except FileNotFoundError as error:
        raise FileNotFoundError(str(error).replace("Set checkpoint=", "Set reference=")) from None
    stored = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    classes = list(stored["hyper_parameters"]["classes"])
    with open_dict(run):
        run.backbone.weights = None  # the checkpoint holds them
        run.method.pop("reference", None)  # what that model learned from is not needed any more
    with torch.random.fork_rng(devices=[]):  # a run draws the same numbers with and without a reference
        backbone: Backbone = instantiate(run, "backbone", num_classes=len(classes))
        method = instantiate(run, "method", backbone=backbone, classes=classes)
    method.load_state_dict(stored["state_dict"])
    view = View(run.data.image_size, run.data.crop_fraction, backbone.mean, backbone.std)
    # Of self-supervised methods another classifier than the network's own answers.
    answers = getattr(method, "model", None) is backbone.model and getattr(method, "head_is_trained", True)
    plain = backbone if answers else None
    name = f"{path.parent.parent.name}/{path.stem}"
    manifest = path.parent.parent / "manifest.parquet"
    return FrozenTeacher(method, classes, view, name, plain, manifest=manifest if manifest.exists() else None)


def _library_model(options: dict[str, Any], classes: Sequence[str] | None) -> FrozenTeacher:
    if "name" not in options:
        raise ValueError(f"got reference={options}, expected a `name` in it. Set reference.name=resnet50")
    name = str(options["name"])
    try:
        architecture = find_architecture(name, options.get("library"))
    except ValueError as error:
        raise ValueError(
            f"reference={name}: {error} For a model of yours, set reference=RUN/checkpoints/best.ckpt"
        ) from error
    with torch.random.fork_rng(devices=[]):
        backbone = create_backbone(**{"num_classes": _IMAGENET, **options})
    labels = _imagenet_names(architecture.library, name, classes or ())
    if len(labels) != int(options.get("num_classes", _IMAGENET)):
        raise ValueError(
            f"{name} has {options.get('num_classes')} classes of unknown names. Give ImageNet's {_IMAGENET}, or train "
            "it with lqf-train and set reference to its checkpoint"
        )
    view = View(backbone.image_size, 0.875, backbone.mean, backbone.std)
    return FrozenTeacher(backbone.model, labels, view, name, backbone)


def _imagenet_names(library: str, name: str, classes: Sequence[str]) -> list[str]:
    # Folders are called by WordNet number or by word: whichever the data use.
    info = ImageNetInfo("imagenet-1k")
    words = [str(info.index_to_description(number)) for number in range(_IMAGENET)]
    if library == "torchvision":
        words = list(torchvision.models.get_model_weights(name).DEFAULT.meta["categories"])
    firsts = [word.partition(",")[0] for word in words]
    namings = (
        [str(info.index_to_label_name(number)) for number in range(_IMAGENET)],
        _distinct(words),
        _distinct(firsts),
        _distinct([w.replace(" ", "_") for w in firsts]),
    )
    return list(max(namings, key=lambda naming: len(set(naming) & set(classes))))


def _distinct(names: Sequence[str]) -> list[str]:
    # ImageNet has two cranes and two maillots.
    seen: dict[str, int] = {}
    result = []
    for name in names:
        seen[name] = seen.get(name, 0) + 1
        result.append(name if seen[name] == 1 else f"{name} ({seen[name]})")
    return result


def _is_target(entry: Any) -> bool:
    return isinstance(entry, (Mapping, DictConfig)) and "_target_" in entry
