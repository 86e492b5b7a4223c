"""Which averages of the weights of two models are possible, and why others are not."""

from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from lqf_lightning.backbones.library import find_architecture
from lqf_lightning.comparison.inputs import Side, networks_of
from lqf_lightning.comparison.options import listed_averages
from lqf_lightning.data import ImageDataModule
from lqf_lightning.resume import run_config
from lqf_lightning.teachers import FrozenTeacher


def plan_averages(config: DictConfig, old: Side, new: Side, data: ImageDataModule) -> tuple[list[str], str]:
    """Decide which averages to look at.

    Args:
        config: The composed configuration.
        old: The old model.
        new: The new model.
        data: The data module, set up.

    Returns:
        The kinds, and if there are none, the reason.

    Raises:
        ValueError: Averages were asked for that are not possible.
    """
    several = len(networks_of(new)) > 1
    if not config.averages:
        return [], "they were not asked for (averages=null)"
    reason = _obstacle(old, new, data)
    if config.averages == "auto":
        return ([] if reason else ["soup" if several else "bcwi"]), reason
    kinds = listed_averages(config)
    if reason:
        raise ValueError(f"averages={kinds} are not possible: {reason}. Set averages=null, or other models")
    odd = [kind for kind in kinds if (kind == "soup") != several]
    if odd:
        number = f"new names {len(new.checkpoints)} model{'s' if several else ''}"
        raise ValueError(
            f"averages={odd} need {'one new model' if several else 'several new models'}, but {number}. Set "
            f"averages=[{'soup' if several else 'bcwi'}]"
        )
    return kinds, ""


def _obstacle(old: Side, new: Side, data: ImageDataModule) -> str:
    for side in (old, new):
        members = networks_of(side)
        if not members or len(side.checkpoints) != len(members):
            return f"{side.model.name} is no checkpoint of a run, whose weights could be averaged"
        for member in members:
            if member.backbone is None:
                return (
                    f"{member.name} does not answer by the weights of a network alone (a linearized model is the "
                    "network's expansion around its first weights, a self-supervised one has another classifier), so "
                    "that averages of networks would be other models"
                )
    if len(old.checkpoints) > 1:
        return f"old names {len(old.checkpoints)} models, and averages start from one"
    unchosen = "" if len(data.manifest.rows("val")) else "there are no validation images to choose by"
    return _difference(old, new) or unchosen


def _difference(old: Side, new: Side) -> str:
    runs = [_architecture(path) for side in (old, new) for path in side.checkpoints]
    networks = [_layout(member) for side in (old, new) for member in networks_of(side)]
    images = [_images(member) for member in networks_of(new)]  # the old network may have been trained on other sizes
    for facts in (runs, networks, images):
        for other in facts[1:]:
            odd = [name for name in {**facts[0], **other} if facts[0].get(name) != other.get(name)]
            if odd:
                first, second = (side.get(odd[0], "none") for side in (facts[0], other))
                return f"the models differ in {odd[0]}: {first} and {second}"
    return ""


def _architecture(checkpoint: Path) -> dict[str, Any]:
    # Networks of one name may compute different functions of the same weights.
    options = run_config(checkpoint).backbone
    changes = ("leaky_slope", "stride_in_1x1", "fold_batch_norm", "pooling", "pooling_width")
    known = {f"backbone.{name}": options.get(name) for name in changes}
    library = find_architecture(options.name, options.get("library")).library
    return {"backbone.name": options.name, "backbone.library": library, **known}


def _layout(member: FrozenTeacher) -> dict[str, Any]:
    backbone: Any = member.backbone
    entries = {f"the shape of {name}": tuple(entry.shape) for name, entry in backbone.model.state_dict().items()}
    rest = {name: shape for name, shape in entries.items() if not name.startswith(f"the shape of {backbone.head}.")}
    return {"the channel means of images": member.view.mean, "their deviations": member.view.std, **rest}


def _images(member: FrozenTeacher) -> dict[str, Any]:
    return {"data.image_size": member.view.image_size, "data.crop_fraction": member.view.crop_fraction}
