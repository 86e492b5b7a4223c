"""Looking for samples in what a purge has left."""

import json
import pickle
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from lqf_lightning.deletion.traces import Traces, names_samples

_TRAINING_ONLY = ("optimizer_states", "lr_schedulers", "callbacks", "loops", "solver", "random_state")


def remains(folder: Path, indices: Iterable[int], paths: Iterable[str]) -> list[str]:
    """Search every file of a folder for some samples: names, bytes, table columns, lists and stored tensors.

    Weights are no names: that a model has learned from the samples is not found here but by the read-outs.

    Args:
        folder: The run folder.
        indices: Of the samples.
        paths: Of the samples, as the manifest named them before it forgot them.

    Returns:
        Places, each with what was found; empty if nothing was.
    """
    traces, found = Traces(indices, paths), []
    for file in sorted(folder.rglob("*")):
        if not file.is_file():
            continue
        name = file.relative_to(folder).as_posix()
        if traces.in_bytes(name.encode()):
            found.append(f"{name}: the name of the file")
        if traces.in_bytes(file.read_bytes()):
            found.append(f"{name}: a path")
        found += [f"{name}: {what}" for what in _readable(file, traces)]
    return found


def _readable(file: Path, traces: Traces) -> list[str]:
    try:
        return _inside(file, traces)
    except (ValueError, RuntimeError, SafetensorError, pickle.UnpicklingError, EOFError):
        return []  # broken, or a file of somebody else: its bytes were searched, and a purge lists what it cannot read


def _inside(file: Path, traces: Traces) -> list[str]:
    if file.suffix == ".parquet":
        return _in_table(pq.read_table(file).to_pandas(), traces)
    if file.suffix == ".csv":
        return _in_table(pd.read_csv(file), traces)
    if file.suffix == ".json":
        return ["an index in a list"] if traces.in_lists(json.loads(file.read_text())) else []
    if file.suffix == ".txt" and file.name.startswith("data_"):
        lines = {line.strip() for line in file.read_text().splitlines()}
        return ["an index in a line"] if lines & set(map(str, traces.indices)) else []
    if file.suffix == ".safetensors":
        return _in_tensors(load_file(file), traces)
    if file.suffix in (".ckpt", ".pt"):
        content = torch.load(file, map_location="cpu", weights_only=True)
        states = [name for name in _TRAINING_ONLY if isinstance(content, dict) and content.get(name) is not None]
        return [*(f"{name}, which may hold values per sample" for name in states), *_in_tensors(content, traces)]
    return []


def _in_table(table: pd.DataFrame, traces: Traces) -> list[str]:
    found = []
    for column in table:
        name, values = str(column), table[column]
        if pd.api.types.is_numeric_dtype(values):
            alive = ~table["removed"] if "removed" in table else pd.Series(True, index=table.index)  # tombstones stay
            if names_samples(name) and (values.isin(traces.indices) & alive).any():
                found.append(f"an index in the column {name}")
        elif traces.in_bytes("\n".join(map(str, values)).encode()):
            found.append(f"a path in the column {name}")
    return found


def _in_tensors(content: Any, traces: Traces, key: str = "") -> list[str]:
    if isinstance(content, Tensor):
        whole = not content.dtype.is_floating_point and names_samples(key)
        return [f"an index in {key}"] if whole and traces.indices & set(content.flatten().tolist()) else []
    if isinstance(content, dict):
        entries = [(f"{key}.{name}" if key else str(name), value) for name, value in content.items()]
    elif isinstance(content, list | tuple):
        entries = [(key, value) for value in content]
    else:
        return ["a path in " + key] if isinstance(content, str) and traces.in_bytes(content.encode()) else []
    return [what for name, value in entries for what in _in_tensors(value, traces, name)]
