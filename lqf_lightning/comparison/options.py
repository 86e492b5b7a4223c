"""Options of a comparison, checked before anything is opened."""

import math
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

KINDS = ("bcwi", "fisher", "soup")


def refuse_options(config: DictConfig) -> None:
    """Check the options of a comparison.

    Args:
        config: The composed configuration.

    Raises:
        ValueError: An option is of another type, outside its range, or missing.
    """
    for role in ("old", "new"):
        if OmegaConf.is_missing(config, role) or config[role] is None:
            raise ValueError(f"`{role}` must be given. Set {role}=RUN/checkpoints/best.ckpt")
    _refuse_values(config)
    shares = list(config.shares) if isinstance(config.shares, ListConfig) else None
    if not shares or not all(_is_number(share) and 0 <= share <= 1 for share in shares) or _repeat(shares):
        got = config.shares if shares is None else shares
        raise ValueError(f"`shares` must be a list of different numbers from 0 to 1, got {got}. Set shares=[0,0.5,1]")
    kinds = listed_averages(config)
    if _repeat(kinds) or not set(kinds) <= set(KINDS):
        raise ValueError(f"`averages` may hold each once of {', '.join(KINDS)}, got {kinds}. Set averages=[bcwi]")


def listed_averages(config: DictConfig) -> list[str]:
    """Tell which averages were asked for by name.

    Args:
        config: The composed configuration.

    Returns:
        Their kinds; none for null and "auto".

    Raises:
        ValueError: It is neither of these, nor a list.
    """
    averages = config.averages
    if averages is None or averages == "auto":
        return []
    if not isinstance(averages, ListConfig):
        raise ValueError(
            f"`averages` must be auto, null or a list of {', '.join(KINDS)}, got {averages!r}. Set averages=auto"
        )
    return [str(kind) for kind in averages]


def _refuse_values(config: DictConfig) -> None:
    level, increase = config.level, config.max_error_increase
    batch_norm, fisher = config.batch_norm_samples, config.fisher_samples
    values = {
        "level": ("a number between 0 and 1", _is_number(level) and 0 < level < 1, 0.95),
        "resamples": ("a whole number, at least 1", _is_whole(config.resamples, 1), 2000),
        "gallery": ("a whole number, at least 0", _is_whole(config.gallery, 0), 24),
        "seed": ("a whole number, at least 0", _is_whole(config.seed, 0), 0),
        "max_error_increase": ("a number, at least 0", _is_number(increase) and increase >= 0, 0.01),
        "batch_norm_samples": ("null (all) or at least 2", batch_norm is None or _is_whole(batch_norm, 2), "null"),
        "fisher_samples": ("null (all) or at least 1", fisher is None or _is_whole(fisher, 1), "null"),
        "split": ("'val' or 'test'", config.split in ("val", "test"), "test"),
        "batch_norm": ("'reestimate' or 'average'", config.batch_norm in ("reestimate", "average"), "reestimate"),
        "device": ("a name", isinstance(config.device, str), "auto"),
    }
    for name, (expected, valid, example) in values.items():
        if not valid:
            raise ValueError(f"`{name}` must be {expected}, got {config[name]!r}. Set {name}={example}")


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def _is_whole(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _repeat(values: list[Any]) -> bool:
    return len(set(values)) < len(values)
