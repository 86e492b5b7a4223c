"""The one place that turns configuration into objects."""

import difflib
import inspect
from typing import Any

import hydra
from hydra.errors import InstantiationException
from omegaconf import DictConfig, OmegaConf

_OPENED = {"reference", "references"}  # options whose values, names of models, are handed over as the models


def instantiate(config: DictConfig, key: str, **extra: Any) -> Any:
    """Build the object that a config node describes by its `_target_`.

    Args:
        config: The whole configuration.
        key: Dotted name of the node.
        extra: Arguments that are not configuration.

    Returns:
        The object, or a partial function where the node says ``_partial_: true``.

    Raises:
        InstantiationException: The target or a value is missing, or a key is unknown, at any depth; the message says
            which.
    """
    node = OmegaConf.select(config, key)
    if node is None or "_target_" not in node:
        raise InstantiationException(f"`{key}` has no `_target_`, got {node}. Choose one of its group with {key}=...")
    _check(node, key, set(extra) - _OPENED)
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


def _check(node: DictConfig, key: str, extra: set[str]) -> None:
    target = str(node["_target_"])
    try:
        constructor = hydra.utils.get_object(target)
    except (ImportError, ValueError) as error:
        raise InstantiationException(f"`{key}._target_={target}` cannot be imported: {error}") from error
    known = _options(constructor, extra)
    for name in map(str, node):
        if OmegaConf.is_missing(node, name):
            raise InstantiationException(f"`{key}.{name}` must be given. Set {key}.{name}=...")
        if known is not None and name not in known and not name.startswith("_"):
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"Did you mean `{key}.{near[0]}`? " if near else ""
            raise InstantiationException(f"`{key}.{name}` is no option of {target}. {hint}Its options: {known}.")
        child = node[name]
        if isinstance(child, DictConfig) and "_target_" in child:
            _check(child, f"{key}.{name}", set())


def _options(constructor: Any, extra: set[str]) -> list[str] | None:
    # None where every key is welcome.
    parameters = inspect.signature(constructor).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return None
    return [name for name in parameters if name not in extra]
