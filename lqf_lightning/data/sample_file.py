"""Files and lists that name training samples: those to train on or to forget, or how much each of them counts."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import torch
from torch import Tensor

from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.tombstone import tombstone_name

_READERS = (".parquet", ".csv", ".json", ".txt")


def read_subset(file: str | Path, manifest: Manifest) -> npt.NDArray[np.int64]:
    """Read which training samples to train on.

    Args:
        file: Parquet, CSV or JSON with a column `index` (of the manifest) or `path`, or a text file (.txt) with one
            index or path per line; with both columns, they have to agree.
        manifest: The samples.

    Returns:
        Indices in increasing order, those of samples whose file is gone or that were forgotten included.
    """
    table = _read(Path(file), f"data.subset={file}", [], "Set data.subset=null to use all")
    return np.sort(_indices(table, f"data.subset={file}", manifest))


def read_named(named: str | Path | Sequence[Any], manifest: Manifest, option: str) -> npt.NDArray[np.int64]:
    """Find the training samples that a list names, or a file of one of the forms that `read_subset` takes.

    Args:
        named: Indices of the manifest or paths, or the file.
        manifest: The samples.
        option: What asks for them, for messages: "cohort".

    Returns:
        Indices in increasing order, those of samples that were forgotten included.
    """
    if isinstance(named, str | Path):
        table = _read(Path(named), f"{option}={named}", [], f"Set {option} to another file, or to a list as [3,17]")
        return np.sort(_indices(table, f"{option}={named}", manifest))
    return np.sort(_indices(_named(list(named)), f"{option}=[...]", manifest))


def read_weights(file: str | Path, manifest: Manifest, copies: int = 1) -> Tensor:
    """Read how much training samples count.

    Args:
        file: Parquet, CSV or JSON with a column `index` (of the manifest) or `path`, and a column `weight`.
        manifest: The samples.
        copies: Samples that a training image stands for, each with its weight.

    Returns:
        Weights by index (copies * len(manifest),) in double precision: 1 for all that the file does not name.

    Raises:
        ValueError: A weight is negative or no number, or the training samples of a class have none.
    """
    table = _read(Path(file), f"data.weights={file}", ["weight"], "Set data.weights=null to do without")
    indices = _indices(table, f"data.weights={file}", manifest)
    given = pd.to_numeric(table["weight"], errors="coerce").to_numpy(dtype=np.float64)
    wrong = np.flatnonzero(~(np.isfinite(given) & (given >= 0)))
    if len(wrong):
        raise ValueError(
            f"data.weights={file}: {len(wrong)} weights are not finite numbers of at least 0; the first is "
            f"{table['weight'].iloc[wrong[0]]} of index {indices[wrong[0]]}. Correct the file, or set data.weights=null"
        )
    weights = np.ones(len(manifest))
    weights[indices] = given
    train = manifest.rows("train")
    total = np.bincount(train["label"], weights[train["index"]], len(manifest.classes))
    absent = np.intersect1d(train["label"], np.flatnonzero(total == 0))
    if len(absent):
        raise ValueError(
            f"data.weights={file}: all training samples of {manifest.classes[absent[0]]} have weight 0, "
            "that is, are absent. Give one of them a positive weight, or set data.weights=null"
        )
    return torch.from_numpy(np.tile(weights, copies))


def _read(file: Path, place: str, needed: list[str], advice: str) -> pd.DataFrame:
    forms = [form for form in _READERS if form != ".txt" or not needed]
    if not file.is_file():
        raise FileNotFoundError(f"{place}: there is no such file. {advice}")
    if file.suffix not in forms:
        raise ValueError(f"{place}: got a {file.suffix or 'nameless'} file, expected one of {forms}")
    try:
        table = _parse(file)
    except (ValueError, KeyError, TypeError) as error:  # what pandas, pyarrow and json raise
        raise ValueError(f"{place} cannot be read as {file.suffix[1:]}: {error}") from error
    known = {"index", "path", *needed}
    keys, missing = {"index", "path"} & set(table), [name for name in needed if name not in table]
    if not keys or missing or set(table) - known:
        raise ValueError(
            f"{place}: got the columns {list(table)}, expected "
            f"{' and '.join(['index (or path, or both)', *needed])} and no others"
        )
    if not len(table):
        raise ValueError(f"{place} names no sample. {advice}")
    return table


def _parse(file: Path) -> pd.DataFrame:
    if file.suffix == ".parquet":
        return pd.read_parquet(file)
    if file.suffix == ".csv":
        return pd.read_csv(file)
    if file.suffix == ".txt":
        return _named([line.strip() for line in file.read_text().splitlines() if line.strip()])
    content = json.loads(file.read_text())
    return _named(content) if isinstance(content, list) and not _records(content) else pd.DataFrame(content)


def _records(entries: list[Any]) -> bool:
    return any(isinstance(entry, dict) for entry in entries)


def _named(entries: list[Any]) -> pd.DataFrame:
    # A plain list: all numbers are indices, else all are paths.
    texts = [str(entry) for entry in entries]
    return pd.DataFrame({"index" if all(text.lstrip("-").isdigit() for text in texts) else "path": texts})


def _indices(table: pd.DataFrame, place: str, manifest: Manifest) -> npt.NDArray[np.int64]:
    known = manifest.table
    train = known[(known["split"] == "train") & ((known["true_label"] >= 0) | manifest.forgotten)]
    if "path" in table and manifest.key:
        table = table.assign(path=_as_in_manifest(table["path"], manifest))
    if "index" in table:
        numbers = pd.to_numeric(table["index"], errors="coerce")
        positions = numbers.where(numbers.isin(train["index"]))
    else:
        positions = table["path"].map(pd.Series(train["index"].to_numpy(), index=train["path"]))
    key = "index" if "index" in table else "path"
    odd = table.loc[positions.isna().to_numpy(), key]
    if len(odd):
        raise ValueError(
            f"{place}: {len(odd)} of {len(table)} entries are no training samples; the first is {key} {odd.iloc[0]}. "
            f"Expected some of the {len(train)} that the manifest lists with split=train"
        )
    found = positions.to_numpy(dtype=np.int64)
    if len(np.unique(found)) < len(found):
        twice = table[key][pd.Series(found, index=table.index).duplicated()].iloc[0]
        raise ValueError(f"{place}: {key} {twice} is named more than once, expected every sample once at most")
    if {"index", "path"} <= set(table):
        _refuse_other_numbering(table, known["path"].to_numpy()[found], place)
    return found


def _as_in_manifest(paths: "pd.Series[str]", manifest: Manifest) -> list[str]:
    # Files from before a sample was forgotten still name its path.
    buried = set(manifest.table.loc[manifest.forgotten, "path"])
    names = [tombstone_name(str(path), manifest.key) for path in paths]
    return [name if name in buried else path for name, path in zip(names, paths, strict=True)]


def _refuse_other_numbering(table: pd.DataFrame, paths: npt.NDArray[np.object_], place: str) -> None:
    other = np.flatnonzero(table["path"].to_numpy() != paths)
    if len(other):
        first = other[0]
        raise ValueError(
            f"{place}: {len(other)} of {len(table)} indices belong to other paths; the first is "
            f"{table['index'].iloc[first]}, {table['path'].iloc[first]} there and {paths[first]} here. Set "
            "data.manifest to the manifest of the run that the file was made from, or leave out the column index"
        )
