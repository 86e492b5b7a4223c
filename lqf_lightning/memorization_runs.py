"""The runs of a sweep over random subsets: read one by one, and checked to belong together."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from omegaconf import OmegaConf
from torch import Tensor

from lqf_lightning.data import Manifest
from lqf_lightning.progress import track

log = logging.getLogger(__name__)
RUN_FILE = "memorization_run.parquet"
_SEEDS = ("seed", "data.seed", "data.subset_seed")
_ASIDE = ("paths", "hydra", "logger", "callbacks", "checkpoints", "progress", "test", "objective", "ckpt_path")
_SAME = ["index", "split", "path", "label", "sha"]


@dataclass(frozen=True)
class SubsetRuns:
    """What all runs of a sweep get right.

    Attributes:
        train: Rows of the manifest that runs were trained on or not (N), as a table.
        others: Rows that none was trained on (M).
        ratio: Share of the training samples in each run.
        mask: Which run was trained on which sample (T, N), bool.
        correct: What it gets right of these (T, N), bool.
        correct_other: And of the others (T, M), bool.
    """

    train: pd.DataFrame
    others: pd.DataFrame
    ratio: float
    mask: Tensor
    correct: Tensor
    correct_other: Tensor


def read_runs(folder: Path) -> SubsetRuns:
    """Read all runs below a folder, one after the other, and check that they belong together.

    Args:
        folder: Of a multirun.

    Returns:
        What they get right; a byte per run and sample.

    Raises:
        FileNotFoundError: There are no such runs.
        ValueError: There is a single run, or runs differ in more than their seeds, or not at all.
    """
    paths = sorted(path.parent for path in folder.rglob(RUN_FILE))
    if not paths:
        raise FileNotFoundError(
            f"no {RUN_FILE} below {folder}. Train runs first: lqf-train -m data.subset_ratio=0.7 "
            "'data.subset_seed=range(200)' callbacks=[memorization]"
        )
    if len(paths) < 2:
        raise ValueError(
            f"{paths[0]} is the only run below {folder}, and memorization compares runs. Train more of them"
        )
    others = {".hydra", "wandb"}  # which keep files of this name of their own
    started = {path.parent for path in folder.rglob("config.yaml") if not others & {*path.relative_to(folder).parts}}
    unfinished = len(started - set(paths))
    if unfinished:
        log.warning("%d runs below %s have no %s: they are left out", unfinished, folder, RUN_FILE)
    ratio = _refuse_other_configs(paths)
    first = Manifest.read(paths[0] / "manifest.parquet")
    known = first.table[~first.table["removed"]]
    train = known[(known["split"] == "train") & known["labeled"]].reset_index(drop=True)
    split = "test" if (known["split"] == "test").any() else "val"
    asked = known[known["split"] == split].reset_index(drop=True)
    parts = [_read(path, paths[0], first, train, asked) for path in track(paths, "reading runs", len(paths))]
    mask, correct, correct_other = (torch.stack(entries) for entries in zip(*parts, strict=True))
    return SubsetRuns(train, asked, ratio, mask, correct, correct_other)


def _refuse_other_configs(paths: list[Path]) -> float:
    seen: dict[tuple[Any, ...], Path] = {}
    shared: dict[str, Any] = {}
    for path in paths:
        config = _flat(path)
        seeds = tuple(config.pop(name, None) for name in _SEEDS)
        shared = shared or config
        odd = sorted(name for name in shared.keys() | config if shared.get(name) != config.get(name))
        if odd:
            raise ValueError(
                f"{path} and {paths[0]} differ in {', '.join(odd[:5])}: {config.get(odd[0])} and {shared.get(odd[0])}. "
                "Set runs= to the folder of one sweep, over seeds alone"
            )
        if seeds in seen:
            raise ValueError(f"{path} repeats {seen[seeds]}: the same seeds. Remove one, or sweep data.subset_seed")
        seen[seeds] = path
    return float(shared["data.subset_ratio"])


def _flat(path: Path) -> dict[str, Any]:
    # What decides a result, by dotted name; values may hold the run's own folder.
    config: Any = OmegaConf.to_container(OmegaConf.load(path / "config.yaml"), resolve=True)
    own = str(config["paths"]["output_dir"])
    found: dict[str, Any] = {}

    def walk(name: str, value: Any) -> None:
        if isinstance(value, dict):
            for key, entry in value.items():
                walk(f"{name}.{key}" if name else str(key), entry)
        else:
            found[name] = str(value).replace(own, "RUN")

    walk("", {key: value for key, value in config.items() if key not in _ASIDE})
    return found


def _read(path: Path, reference: Path, first: Manifest, train: pd.DataFrame, others: pd.DataFrame) -> list[Tensor]:
    manifest = Manifest.read(path / "manifest.parquet")
    if manifest.classes != first.classes or not manifest.table[_SAME].equals(first.table[_SAME]):
        raise ValueError(
            f"the samples or classes of {path} are not those of {reference}. Set data.manifest={reference}/"
            "manifest.parquet in all runs"
        )
    run = pd.read_parquet(path / RUN_FILE).set_index("index")
    missing = {*train["index"], *others["index"]} - set(run.index)
    if missing:
        raise ValueError(f"{path / RUN_FILE} lacks {len(missing)} samples of the manifest: train the run again")
    kept, other = run.loc[train["index"]], run.loc[others["index"]]
    columns = (kept["used"], kept["correct"], other["correct"])
    return [torch.from_numpy(column.to_numpy(copy=True)) for column in columns]
