"""One file of a run folder, without the samples that are to be forgotten."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow.parquet as pq

from lqf_lightning.data.table_file import replace_table
from lqf_lightning.deletion.traces import Traces, names_samples

_LOGS = (".log", ".html", ".txt", ".jsonl")  # told again by nobody: where they name a sample, they go
_TEXTS = (".json", ".yaml", ".yml", ".md")


def filter_file(file: Path, traces: Traces) -> str:
    """Take the samples out of a file, or say what has to become of it.

    Tables lose the rows of the samples; logs and pages that name one are not worth editing; settings and other texts
    that name one are left to a person.

    Args:
        file: The file; replaced as a whole where rows are dropped.
        traces: The samples.

    Returns:
        "clean", "filtered", "delete", or the reason why a person has to look at it.
    """
    readers: dict[str, Callable[[Path, Traces], str]] = {".parquet": _parquet, ".csv": _csv, ".json": _json}
    if file.name.startswith("data_") and file.suffix == ".txt":
        return _lines(file, traces)
    if file.suffix in readers:
        try:
            return readers[file.suffix](file, traces)
        except ValueError as error:  # what pyarrow, pandas and json raise
            return f"cannot be read ({str(error).partition(chr(10))[0]})"
    if file.suffix in _LOGS:
        return "delete" if traces.in_bytes(file.read_bytes()) else "clean"
    if file.suffix in _TEXTS or not file.suffix:
        return "names a sample of the cohort" if traces.in_bytes(file.read_bytes()) else "clean"
    return f"files ending in {file.suffix} are not known"


def _parquet(file: Path, traces: Traces) -> str:
    table = pq.read_table(file)
    others = [name for name in table.column_names if names_samples(name) and name not in ("index", "path")]
    rows = traces.rows(table.select([n for n in ("index", "path") if n in table.column_names]).to_pandas())
    if others or _names_by_other(table, traces):
        return "delete"  # rows of other samples name those of the cohort, as pairs do
    if not rows.any():
        return "clean"
    replace_table(table.filter(~rows), file)
    return "filtered"


def _names_by_other(table: Any, traces: Traces) -> bool:
    texts = [name for name in table.column_names if str(table.schema.field(name).type) in ("string", "large_string")]
    others = [name for name in texts if name != "path"]
    return any(traces.in_bytes("\n".join(map(str, table[name].to_pylist())).encode()) for name in others)


def _csv(file: Path, traces: Traces) -> str:
    table = pd.read_csv(file, dtype=str, keep_default_na=False)
    rows = traces.rows(table)
    if rows.any():
        _replace(file, table[~rows].to_csv(index=False))
    return "filtered" if rows.any() else _left(file, traces)


def _json(file: Path, traces: Traces) -> str:
    content = json.loads(file.read_text())
    if file.name.startswith("data_"):
        return _sample_list(file, content, traces)
    if traces.in_lists(content):
        return "lists the index of a sample of the cohort"
    return _left(file, traces)


def _sample_list(file: Path, content: Any, traces: Traces) -> str:
    plain = isinstance(content, list) and not any(isinstance(entry, dict) for entry in content)
    if plain:
        left: Any = [entry for entry in content if not _is_member(str(entry), traces)]
        changed = len(left) < len(content)
    else:
        table = pd.DataFrame(content)
        rows = traces.rows(table)
        left, changed = json.loads(table[~rows].to_json(orient="records")), bool(rows.any())
    if changed:
        _replace(file, json.dumps(left))
    return "filtered" if changed else "clean"


def _lines(file: Path, traces: Traces) -> str:
    lines = file.read_text().splitlines()
    left = [line for line in lines if not _is_member(line.strip(), traces)]
    if len(left) < len(lines):
        _replace(file, "".join(f"{line}\n" for line in left))
    return "filtered" if len(left) < len(lines) else "clean"


def _is_member(entry: str, traces: Traces) -> bool:
    return entry in traces.paths or (entry.isdigit() and int(entry) in traces.indices)


def _left(file: Path, traces: Traces) -> str:
    return "names a sample of the cohort" if traces.in_bytes(file.read_bytes()) else "clean"


def _replace(file: Path, text: str) -> None:
    partial = file.with_name(file.name + ".partial")
    partial.write_text(text)
    partial.replace(file)
