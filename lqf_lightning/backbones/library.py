"""Which library an architecture comes from, and how that library builds it."""

import difflib
from dataclasses import dataclass
from typing import Any, Literal

import timm
import torchvision
from torch import nn

Library = Literal["timm", "torchvision"]

# Their auxiliary heads make training and evaluation return different types.
_UNSUPPORTED_TORCHVISION = ("googlenet", "inception_v3")


@dataclass(frozen=True)
class Architecture:
    """One architecture of one library, and how its published weights expect their input.

    Attributes:
        name: The library's name.
        library: ``timm`` or ``torchvision``.
        mean: Channel means of the published weights.
        std: Channel deviations of the published weights.
        image_size: Side in pixels of their images.
        fixed_size: Whether the network must be built for one image size.
    """

    name: str
    library: Library
    mean: tuple[float, ...]
    std: tuple[float, ...]
    image_size: int
    fixed_size: bool

    def build(self, num_classes: int, image_size: int | None, pretrained: bool = False) -> nn.Module:
        """Build the network.

        Args:
            num_classes: Number of logits C.
            image_size: Side in pixels of the images; None takes that of the published weights.
            pretrained: Let timm load its published weights, which it adapts to the image size; torchvision's are loaded
                by :mod:`lqf_lightning.backbones.weights`.

        Returns:
            The library's own module.
        """
        options: dict[str, Any] = {"num_classes": num_classes}
        if self.fixed_size:
            options["img_size" if self.library == "timm" else "image_size"] = image_size or self.image_size
        if self.library == "timm":
            return timm.create_model(self.name, pretrained=pretrained, **options)
        return torchvision.models.get_model(self.name, weights=None, **options)  # type: ignore[no-any-return]  # untyped


def find_architecture(name: str, library: Library | None = None) -> Architecture:
    """Look an architecture up.

    A name that both libraries have, such as ``resnet50``, means torchvision's unless ``library`` says otherwise; a
    timm tag (``resnet50.a1_in1k``) always means timm's.

    Args:
        name: The library's name.
        library: ``timm``, ``torchvision``, or None for whichever has it.

    Returns:
        The architecture.

    Raises:
        ValueError: If no library has the name, or ``library`` is unknown.
    """
    if library not in {None, "timm", "torchvision"}:
        raise ValueError(f"got backbone.library={library}, expected timm, torchvision or null")
    if library != "timm" and name in _torchvision_names():
        return _from_torchvision(name)
    if library != "torchvision" and timm.is_model(name):
        return _from_timm(name)
    known = {"timm": timm.list_models, "torchvision": _torchvision_names}
    searched = [library] if library else list(known)
    nearest = {key: difflib.get_close_matches(name, known[key](), n=3, cutoff=0.5) for key in known}
    raise ValueError(
        f"got backbone.name={name}, which {' and '.join(searched)} cannot provide. Nearest names: "
        + "; ".join(f"{key}: {', '.join(names) or 'none'}" for key, names in nearest.items())
        + ". Set backbone.name=... (and backbone.library=timm or torchvision to insist on one)."
    )


def _torchvision_names() -> list[str]:
    names = torchvision.models.list_models(module=torchvision.models)
    return [name for name in names if name not in _UNSUPPORTED_TORCHVISION]


def _from_torchvision(name: str) -> Architecture:
    preset = torchvision.models.get_model_weights(name).DEFAULT.transforms()
    return Architecture(
        name=name,
        library="torchvision",
        mean=tuple(preset.mean),
        std=tuple(preset.std),
        image_size=preset.crop_size[0],
        fixed_size=name.startswith("vit_"),
    )


def _from_timm(name: str) -> Architecture:
    try:
        config = timm.get_pretrained_cfg(name)
    except RuntimeError:  # an unknown tag
        config = None
    if config is None:
        architecture = name.partition(".")[0]
        tags = timm.list_models(f"{architecture}.*", pretrained=True)
        raise ValueError(
            f"got backbone.name={name}, expected one of timm's {', '.join(tags) or architecture}. Set backbone.name=..."
        )
    return Architecture(
        name=name,
        library="timm",
        mean=tuple(config.mean),
        std=tuple(config.std),
        image_size=config.input_size[-1],
        fixed_size=bool(config.fixed_input_size),
    )
