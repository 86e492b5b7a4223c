"""`lqf-compare`: what a new model breaks that the old one got right, and which average of the two breaks less."""

import datetime
import logging
import math
import sys
from pathlib import Path
from typing import Any, cast

import hydra
import torch
from omegaconf import DictConfig, OmegaConf

from lqf_lightning._instantiate import instantiate_all
from lqf_lightning._launch import one_job
from lqf_lightning.comparison.average_plan import plan_averages
from lqf_lightning.comparison.averages import Study, bootstrap_options
from lqf_lightning.comparison.flips import Comparison, compare_answers, flips, replacements, summarize
from lqf_lightning.comparison.inputs import (
    Side,
    name_absolutely,
    open_data,
    open_side,
    refuse_incomparable,
    seen_in_training,
)
from lqf_lightning.comparison.log import log_comparison, print_comparison
from lqf_lightning.comparison.options import refuse_options
from lqf_lightning.comparison.page import write_page
from lqf_lightning.comparison.predictions import predict
from lqf_lightning.comparison.words import verdict
from lqf_lightning.data import ImageDataModule
from lqf_lightning.run_folder import write_json, write_metrics, write_start
from lqf_lightning.train import prepare_process

log = logging.getLogger(__name__)
_MODULE = "lqf_lightning.compare"


def compare(config: DictConfig) -> dict[str, Any]:
    """Compare two models on the same images, and average their weights where that is possible.

    Args:
        config: The composed configuration (see ``conf/compare.yaml``).

    Returns:
        The report, as written to ``report.json``.
    """
    refuse_options(config)
    device = choose_device(config.device)
    name_absolutely(config)
    folder, split = Path(config.paths.output_dir), str(config.split)
    data_config, data = open_data(config)
    old, new = (open_side(config, role, data.classes) for role in ("old", "new"))
    refuse_incomparable(data, split, old, new)
    kinds, reason = plan_averages(config, old, new, data)
    write_start(folder, config)
    data.manifest.write(folder / "manifest.parquet")
    loggers = instantiate_all(config, "logger")
    for logger in loggers:
        logger.log_hyperparams(cast(dict[str, Any], OmegaConf.to_container(config, resolve=True)))

    log.info("comparing %s with %s on the %s set", new.model.name, old.model.name, split)
    splits = list(dict.fromkeys([split, "val"] if kinds else [split]))
    answers = predict([old.model, new.model], data, splits, device)
    for side, answer in zip((old, new), answers, strict=True):
        answer.write(folder / f"{side.role}_predictions.parquet")
    comparisons = {name: compare_answers(data.manifest.rows(name), *answers) for name in splits}
    report = _report(config, data, (old, new), comparisons, device)
    report["averages"] = {"kinds": [], "reason": reason, "chosen": None}
    if kinds:
        report["averages"] = Study(config, old, new, data_config, data, comparisons, device).run(kinds)
    report = cast(dict[str, Any], plain(report))
    report["verdict"] = verdict(report)
    write_json(folder / "report.json", report)
    page = write_page(folder / "report.html", report, data, config.gallery)
    write_metrics(folder, log_comparison(loggers, report, page))
    return report


def choose_device(name: str) -> torch.device:
    """Find where to compute.

    Args:
        name: "auto", or a device of torch.

    Returns:
        The device; for "auto" a GPU where there is one.

    Raises:
        ValueError: There is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch built without CUDA asserts
        raise ValueError(f"device={name} cannot be used here: {str(error).splitlines()[0]} Set device=auto") from error
    return device


def plain(value: Any) -> Any:
    """Make a value fit for JSON.

    Args:
        value: Numbers, texts, lists and dictionaries.

    Returns:
        The same, with None for NaN and infinities.

    Example:
        >>> plain({"a": [1, float("nan")]})
        {'a': [1, None]}
    """
    if isinstance(value, dict):
        return {str(key): plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _report(
    config: DictConfig,
    data: ImageDataModule,
    sides: tuple[Side, Side],
    comparisons: dict[str, Comparison],
    device: torch.device,
) -> dict[str, Any]:
    comparison = comparisons[config.split]
    found = flips(comparison)
    return {
        "split": config.split,
        "level": config.level,
        "models": {side.role: _describe(side) for side in sides},
        "unshared": _unshared(*sides),
        "flips": summarize(comparison, **bootstrap_options(config)),
        "negative_flips": found,
        "replacements": replacements(found),
        "warnings": seen_in_training(data, list(comparisons), sides),
        "provenance": _provenance(config, data, device),
    }


def _describe(side: Side) -> dict[str, Any]:
    members = [
        {"name": member.name, "fingerprint": member.fingerprint} for member in getattr(side.model, "members", ())
    ]
    return {
        "name": side.model.name,
        "fingerprint": side.model.fingerprint,
        "checkpoints": [str(path) for path in side.checkpoints],
        "members": members,
        "classes": len(side.model.classes),
    }


def _unshared(old: Side, new: Side) -> dict[str, list[str]]:
    return {
        "only_old": [name for name in old.model.classes if name not in set(new.model.classes)],
        "only_new": [name for name in new.model.classes if name not in set(old.model.classes)],
    }


def _provenance(config: DictConfig, data: ImageDataModule, device: torch.device) -> dict[str, Any]:
    source = getattr(data.source, "root", None) or type(data.source).__name__
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "command": sys.argv,
        "device": str(device),
        "data": str(source),
        "folder": str(Path(config.paths.output_dir).absolute()),
        "seed": config.seed,
        "resamples": config.resamples,
    }


@hydra.main(version_base="1.3", config_path="pkg://lqf_lightning.conf", config_name="compare")
def _run(config: DictConfig) -> None:
    with one_job(_MODULE):
        report = compare(config)
    print_comparison(report, Path(config.paths.output_dir))  # after W&B's own last words


def main() -> None:
    """Entry point of ``lqf-compare``."""
    prepare_process()
    _run()


if __name__ == "__main__":
    main()
