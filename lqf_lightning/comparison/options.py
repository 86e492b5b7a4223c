"""Options of a comparison, checked before anything is opened."""

from omegaconf import DictConfig, ListConfig, OmegaConf

KINDS = ("bcwi", "fisher", "soup")


def refuse_options(config: DictConfig) -> None:
    """Check the options of a comparison.

    Args:
        config: The composed configuration.

    Raises:
        ValueError: An option is outside its range, or missing.
    """
    for role in ("old", "new"):
        if OmegaConf.is_missing(config, role):
            raise ValueError(f"`{role}` must be given. Set {role}=RUN/checkpoints/best.ckpt")
    numbers = {
        "level": ("between 0 and 1", 0 < config.level < 1, 0.95),
        "resamples": ("at least 1", config.resamples >= 1, 2000),
        "gallery": ("at least 0", config.gallery >= 0, 24),
        "max_error_increase": ("at least 0", config.max_error_increase >= 0, 0.01),
        "batch_norm_samples": ("null (all) or at least 2", _null_or_above(config.batch_norm_samples, 2), "null"),
        "fisher_samples": ("null (all) or at least 1", _null_or_above(config.fisher_samples, 1), "null"),
        "split": ("'val' or 'test'", config.split in ("val", "test"), "test"),
        "batch_norm": ("'reestimate' or 'average'", config.batch_norm in ("reestimate", "average"), "reestimate"),
    }
    for name, (expected, valid, example) in numbers.items():
        if not valid:
            raise ValueError(f"`{name}` must be {expected}, got {config[name]!r}. Set {name}={example}")
    shares = list(config.shares)
    if not shares or len(set(shares)) < len(shares) or not all(0 <= share <= 1 for share in shares):
        raise ValueError(f"`shares` must be different numbers from 0 to 1, got {shares}. Set shares=[0,0.5,1]")
    unknown = [kind for kind in listed_averages(config) if kind not in KINDS]
    if unknown:
        raise ValueError(f"`averages` may hold {', '.join(KINDS)}, got {unknown}. Set averages=[bcwi]")


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


def _null_or_above(value: int | None, least: int) -> bool:
    return value is None or value >= least
