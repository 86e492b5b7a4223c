"""Give a convolutional classifier second-order pooling."""

from collections.abc import Callable
from functools import partial
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lqf_lightning.backbones.second_order_pooling import SecondOrderPooling

Pooling = Literal["average", "second_order", "both"]
Pool = Callable[[nn.Module, str], str]
_Output = tuple[str, Tensor, Tensor]  # name of a module, its input and its output


def choose_pooling(pooling: Pooling, width: int, name: str, image_size: int) -> Pool | None:
    """Say what has to be done to a network for a pooling.

    Args:
        pooling: ``average``, which networks of the libraries have; ``second_order``, or ``both``.
        width: Number W of directions of the second-order features.
        name: The architecture's name, for errors.
        image_size: Side in pixels of the images.

    Returns:
        A function of the network and the name of its head (see :func:`pool_second_order`), or None: nothing.

    Raises:
        ValueError: If the pooling is unknown.
    """
    known = get_args(Pooling)
    if pooling not in known:
        raise ValueError(f"got backbone.pooling={pooling}, expected {', '.join(known)}. Set backbone.pooling=average")
    if pooling == "average":
        return None
    return partial(pool_second_order, width=width, name=name, image_size=image_size, with_average=pooling == "both")


def pool_second_order(
    model: nn.Module, head: str, width: int, name: str, image_size: int, *, with_average: bool = False
) -> str:
    """Put second-order pooling where a network averages its last map for the head, and a head of the new width.

    The place is found by running the network once: a module without parameters whose output is the mean of its input
    over places, and is what the head sees. So any architecture of a library will do that pools in a module; the others
    are refused, among them transformers that pool tokens, and networks with layers between average and head.

    Args:
        model: A timm or torchvision classifier, changed in place; the new head has torch's own initial values.
        head: Name of its last layer.
        width: Number W of directions that channels are projected to; the covariance gives W (W + 1) / 2 features.
        name: The architecture's name, for errors.
        image_size: Side in pixels of the images.
        with_average: Whether the head goes on seeing the average as well.

    Returns:
        Name of the pooling module.

    Raises:
        ValueError: If the last map has a single place, the network pools in another way, or the width is more than
            the map's channels.
    """
    outputs = _handed_to_head(model, head, image_size)
    found = _find_average(outputs)
    single = any(maps.shape[2:].numel() == 1 for _, maps, _ in outputs)
    if found is None and single and _find_average(_handed_to_head(model, head, 4 * image_size)) is not None:
        raise ValueError(
            f"second-order pooling: at data.image_size={image_size} the last map of backbone.name={name} has one "
            f"place, over which nothing varies. Set data.image_size={4 * image_size}, or backbone.pooling=average"
        )
    if found is None:
        raise ValueError(
            f"second-order pooling needs a network that averages its last feature map right before its head, in a "
            f"module of its own; backbone.name={name} does not (transformers pool tokens, others have layers behind "
            "the average). Set backbone.pooling=average, or another backbone.name, such as tf_efficientnet_lite0 or "
            "resnet50; where torchvision's network has no such module, timm's of that name often has"
        )
    place, maps, pooled = found
    pooling = SecondOrderPooling(maps[1], width, with_average=with_average, keep_places=len(pooled) == 4)
    model.set_submodule(place, pooling)
    old: Any = model.get_submodule(head)
    biased = old.bias is not None
    new: nn.Module = (
        nn.Conv2d(pooling.features, old.out_channels, 1, bias=biased)
        if isinstance(old, nn.Conv2d)
        else nn.Linear(pooling.features, old.out_features, bias=biased)
    )
    model.set_submodule(head, new.to(old.weight))
    return place


def _find_average(outputs: list[_Output]) -> tuple[str, torch.Size, torch.Size] | None:
    for place, maps, pooled in outputs:  # the outermost of modules within each other comes first
        several = maps.shape[2:].numel() > 1
        if several and torch.allclose(pooled.flatten(1), maps.mean((2, 3)), rtol=1e-4, atol=1e-6):
            return place, maps.shape, pooled.shape
    return None


@torch.no_grad()
def _handed_to_head(model: nn.Module, head: str, image_size: int) -> list[_Output]:
    # Modules without parameters that turn a map into the vector that the head sees.
    calls: dict[str, tuple[Tensor, Tensor]] = {}
    seen: list[Tensor] = []

    def watch(place: str, module: nn.Module) -> Any:
        def hook(_: nn.Module, given: tuple[Any, ...], output: Any) -> None:
            maps = given[0] if given else None
            if not (isinstance(maps, Tensor) and isinstance(output, Tensor) and maps.ndim == 4):
                return
            if output.numel() == maps.shape[:2].numel():
                calls[place] = (maps, output)

        return module.register_forward_hook(hook)

    parts = [(place, module) for place, module in model.named_modules() if place]
    bare = {place: module for place, module in parts if not any(True for _ in module.parameters())}
    handles = [watch(place, module) for place, module in bare.items()]
    handles.append(model.get_submodule(head).register_forward_pre_hook(lambda _, given: seen.append(given[0])))
    modes = [(module, module.training) for module in model.modules()]
    try:
        model.eval()(torch.rand(1, 3, image_size, image_size, generator=torch.Generator().manual_seed(0)))
    finally:
        for handle in handles:
            handle.remove()
        for module, training in modes:
            module.training = training
    (features,) = seen
    outputs = [(place, *calls[place]) for place in bare if place in calls]
    return [output for output in outputs if torch.equal(output[2].flatten(), features.flatten())]
