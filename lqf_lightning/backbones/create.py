"""Build any timm or torchvision classifier with a new head."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from lqf_lightning.backbones.activations import swap_activations
from lqf_lightning.backbones.backbone import Backbone
from lqf_lightning.backbones.fold import fold_batch_norm as fold_batch_norms
from lqf_lightning.backbones.groups import layer_groups
from lqf_lightning.backbones.head import find_head, reset_head
from lqf_lightning.backbones.library import Architecture, Library, find_architecture
from lqf_lightning.backbones.pool_second_order import Pool, Pooling, choose_pooling
from lqf_lightning.backbones.strides import move_strides_to_1x1
from lqf_lightning.backbones.told_slope import refuse_other_slope
from lqf_lightning.backbones.weights import (
    explaining_downloads,
    load_library_weights,
    load_packaged_weights,
    load_weight_file,
)

_logger = logging.getLogger(__name__)


def create_backbone(
    name: str,
    num_classes: int,
    *,
    classes: Sequence[str] | None = None,
    library: Library | None = None,
    weights: Literal["default", "package"] | str | Path | None = "default",
    image_size: int | None = None,
    mean: Sequence[float] | None = None,
    std: Sequence[float] | None = None,
    head_std: float = 0.02,
    leaky_slope: float | None = None,
    stride_in_1x1: bool = False,
    fold_batch_norm: bool = False,
    pooling: Pooling = "average",
    pooling_width: int = 128,
) -> Backbone:
    """Build a classifier, load its weights and give it a new head.

    The head keeps loaded values when they have ``num_classes`` outputs, and if it is known on both sides what these
    stand for, when they are of the same classes, in whatever order; otherwise its weights are drawn from
    N(0, head_std^2) with torch's global generator and its bias is zero.

    Args:
        name: The library's name of the architecture; a timm name may carry a tag.
        num_classes: Number of classes C.
        classes: Names of the classes, in the order of the outputs (C,), which a head that a run of ours has trained
            must share; None takes every head that fits.
        library: ``timm``, ``torchvision``, or None for torchvision where it has the name and timm elsewhere.
        weights: ``default`` (the library's own, downloaded once), ``package`` (EfficientNet-Lite0 from pip, no
            network), the path of a ``.pt``, ``.pth`` or ``.safetensors`` file with the library's keys, a checkpoint of
            a run (``RUN/checkpoints/last.ckpt``, or ``...ckpt@teacher`` for its averaged teacher), or None for random
            weights.
        image_size: Side in pixels of the images, for networks built for one size; None takes the library's.
        mean: Channel means of the weights' input; None takes the library's.
        std: Channel deviations of the weights' input; None takes the library's.
        head_std: Standard deviation of a new head's weights.
        leaky_slope: Replace ReLUs by leaky ReLUs of this slope, as weights of a leaky network need; None leaves the
            network as published.
        stride_in_1x1: Read the weights as ResNet v1 (Caffe, Keras), whose stride sits in the first convolution.
        fold_batch_norm: Fold every BatchNorm into its convolution and drop it.
        pooling: What the head sees of the last map: its ``average``; with ``second_order`` the matrix square root of
            its covariance over places (see :class:`SecondOrderPooling`); or ``both``.
        pooling_width: Number W of directions that the channels are projected to before the covariance is taken, which
            gives W (W + 1) / 2 features.

    Returns:
        The backbone, in eval mode.

    Raises:
        ValueError: If a value does not fit; the text names the override that does.
    """
    if num_classes < 1:
        raise ValueError(f"got num_classes={num_classes}, expected at least 1")
    if classes is not None and len(classes) != num_classes:
        raise ValueError(f"got num_classes={num_classes}, but the names of {len(classes)} classes")
    architecture = find_architecture(name, library)
    size = image_size or architecture.image_size
    pool = choose_pooling(pooling, pooling_width, name, size)
    model, head, source = _with_weights(architecture, num_classes, weights, image_size, head_std, classes, pool)
    refuse_other_slope(weights, leaky_slope)
    if stride_in_1x1:
        move_strides_to_1x1(model)
    if leaky_slope is not None:
        swap_activations(model, leaky_slope)
    model.eval()
    if fold_batch_norm:
        fold_batch_norms(model, torch.rand(2, 3, size, size, generator=torch.Generator().manual_seed(0)))
    _logger.info("backbone %s from %s, weights: %s", name, architecture.library, source)
    return Backbone(
        name=name,
        model=model,
        mean=_channels("mean", architecture.mean if mean is None else mean),
        std=_channels("std", architecture.std if std is None else std),
        head=head,
        groups=layer_groups(model, head),
        image_size=size,
        weights=source,
    )


def _with_weights(
    architecture: Architecture,
    num_classes: int,
    weights: str | Path | None,
    image_size: int | None,
    head_std: float,
    classes: Sequence[str] | None,
    pool: Pool | None,
) -> tuple[nn.Module, str, str]:
    # The new head comes first and the weights second, so that a loaded head that fits keeps its values.
    if weights == "default" and architecture.library == "timm":
        return _from_timm_hub(architecture, num_classes, image_size, head_std, pool)
    model = architecture.build(num_classes, image_size)
    head = find_head(model, num_classes, architecture.name)
    if pool is not None:
        pool(model, head)
    reset_head(model, head, head_std)
    match weights:
        case None:
            source = "random"
        case "default":
            source = load_library_weights(model, architecture, head)
        case "package":
            source = load_packaged_weights(model, architecture, head)
        case path:
            source = load_weight_file(model, Path(path), head, classes)
    return model, head, source


def _from_timm_hub(
    architecture: Architecture, num_classes: int, image_size: int | None, head_std: float, pool: Pool | None
) -> tuple[nn.Module, str, str]:
    with explaining_downloads(architecture.name):
        model = architecture.build(num_classes, image_size, pretrained=True)
    head = find_head(model, num_classes, architecture.name)
    config: Any = model.pretrained_cfg
    if pool is not None:
        pool(model, head)
    if pool is not None or config["num_classes"] != num_classes:
        reset_head(model, head, head_std)
    return model, head, f"timm {config['architecture']}.{config['tag']}".rstrip(".")


def _channels(name: str, values: Sequence[float]) -> tuple[float, float, float]:
    if len(values) != 3:
        raise ValueError(f"got backbone.{name}={list(values)}, expected three numbers, one per color channel")
    red, green, blue = map(float, values)
    return red, green, blue
