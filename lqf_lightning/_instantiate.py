"""The one place that turns configuration into objects."""

import difflib
import inspect
from typing import Any

import hydra
from hydra.errors import HydraException, InstantiationException
from omegaconf import DictConfig, OmegaConf


def instantiate(config: DictConfig, key: str, **extra: Any) -> Any:
    """Build the object that a config node describes by its `_target_`.

    Args:
        config: The whole configuration.
        key: Dotted name of the node.
        extra: Arguments that are not configuration.

    Returns:
        The object, or a partial function where the node says ``_partial_: true``.

    Raises:
        InstantiationException: The target is missing or does not know one of the keys; the message says which.
    """
    node = OmegaConf.select(config, key)
    if node is None or "_target_" not in node:
        raise InstantiationException(f"`{key}` has no `_target_`, got {node}. Choose one of its group with {key}=...")
    target = str(node["_target_"])
    try:
        constructor = hydra.utils.get_object(target)
    except HydraException as error:
        raise InstantiationException(
            f"`{key}._target_={target}` cannot be imported: {error.__cause__ or error}"
        ) from error
    _refuse_unknown_keys(node, key, constructor, set(extra))
    try:
        # The last call is ours: Hydra would turn dataclasses among the extra arguments into configuration.
        factory = hydra.utils.instantiate(node, _partial_=True, _convert_="all")
    except InstantiationException as error:
        if error.__cause__ is not None:  # our own constructors explain themselves better than Hydra's wrapper
            raise error.__cause__ from error
        raise
    return factory if node.get("_partial_", False) else factory(**extra)


def instantiate_all(config: DictConfig, key: str) -> list[Any]:
    """Build every entry of a config node that maps names to targets.

    Args:
        config: The whole configuration.
        key: Dotted name of the node; absent or null gives an empty list.

    Returns:
        The objects, in the node's order; null entries are left out.
    """
    node = OmegaConf.select(config, key)
    return [instantiate(config, f"{key}.{name}") for name, entry in (node or {}).items() if entry is not None]


def _refuse_unknown_keys(node: DictConfig, key: str, constructor: Any, extra: set[str]) -> None:
    parameters = inspect.signature(constructor).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return
    for name in map(str, node):
        if name.startswith("_") or name in parameters:
            continue
        known = [p for p in parameters if p not in extra and p != "self"]
        near = difflib.get_close_matches(name, known, n=1)
        hint = f"Did you mean `{key}.{near[0]}`? " if near else ""
        raise InstantiationException(f"`{key}.{name}` is no option of {node['_target_']}. {hint}Its options: {known}.")
