"""Tables as Parquet files that are there whole or not at all."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq


def write_table(table: pd.DataFrame, file: Path, notes: Mapping[str, Any] | None = None) -> None:
    """Write a table in place of an earlier one; whoever is interrupted leaves the earlier one as it was.

    Args:
        table: The table; its own index is left out.
        file: Where to; folders are made.
        notes: What its numbers depend on, kept in the file as JSON by key.
    """
    content = pa.Table.from_pandas(table, preserve_index=False)
    known = {key.encode(): json.dumps(value).encode() for key, value in (notes or {}).items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    replace_table(content.replace_schema_metadata({**(content.schema.metadata or {}), **known}), file)


def replace_table(content: pa.Table, file: Path) -> None:
    """Write a table of pyarrow in place of an earlier one; whoever is interrupted leaves the earlier one as it was.

    Args:
        content: The table, with its metadata.
        file: Where to, in a folder that exists.
    """
    partial = file.with_name(file.name + ".partial")
    pq.write_table(content, partial)
    partial.replace(file)


def read_notes(file: Path, key: str) -> Any:
    """Read what `write_table` noted.

    Args:
        file: The table.
        key: Of the note.

    Returns:
        The note; None if there is none.
    """
    found = (pq.read_schema(file).metadata or {}).get(key.encode())
    return None if found is None else json.loads(found)
