"""Reads what W&B wrote offline, so that tests can look at a run the way its dashboard would.

W&B has no public reader. The file is a log of protobuf records in chunks: blocks of 32 KiB, each chunk headed by a
checksum, a length and a kind (1 whole, 2 first, 3 middle, 4 last part of a record).
"""

import json
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

_BLOCK, _HEADER, _FILE_HEADER = 32 * 1024, 7, 7


@dataclass
class OfflineRun:
    """One run: its identity, configuration, logged rows, files, files of each artifact, and how it ended."""

    folder: Path
    id: str = ""
    group: str = ""
    name: str = ""
    project: str = ""
    config: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    exit_code: int | None = None
    artifacts: list[dict[str, Path]] = field(default_factory=list)

    def series(self, key: str) -> list[Any]:
        """Values logged under a key, in order; the parts of the key are separated as W&B nests them."""
        return [row[key] for row in self.history if key in row]

    def table(self, key: str) -> tuple[dict[str, Any], dict[str, Path]]:
        """The last table logged under a key, and the files that it refers to; both are in an artifact of their own."""
        files = [files for files in self.artifacts if f"{key}.table.json" in files][-1]
        return json.loads(files[f"{key}.table.json"].read_text()), files

    def picture(self, key: str) -> Path:
        """The file of the last image logged under a key."""
        return self.folder / "files" / self.series(f"{key}/filenames")[-1][-1]


def read_run(path: Path) -> OfflineRun:
    """Read one ``run-ID.wandb`` file; W&B must have been torn down before."""
    run = OfflineRun(path.parent)
    for record in _records(path):
        match record.WhichOneof("record_type"):
            case "run":
                run.id, run.group = record.run.run_id, record.run.run_group
                run.name, run.project = record.run.display_name, record.run.project
                run.config |= _values(record.run.config.update)
            case "config":
                run.config |= _values(record.config.update)
            case "history":
                run.history.append(_values(record.history.item))
            case "artifact":
                contents = record.artifact.manifest.contents
                run.artifacts.append({entry.path: Path(entry.local_path) for entry in contents})
            case "exit":
                run.exit_code = record.exit.exit_code
    return run


def _records(path: Path) -> Iterator[Any]:
    raw, position, parts = path.read_bytes(), _FILE_HEADER, []
    while position + _HEADER <= len(raw):
        left = _BLOCK - position % _BLOCK
        if left < _HEADER:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", raw, position)
        position += _HEADER
        parts.append(raw[position : position + length])
        position += length
        if kind in (1, 4):
            yield wandb_internal_pb2.Record.FromString(b"".join(parts))
            parts = []


def _values(items: Any) -> dict[str, Any]:
    return {"/".join(item.nested_key) or item.key: json.loads(item.value_json) for item in items}
