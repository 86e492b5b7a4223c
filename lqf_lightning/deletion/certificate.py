"""What a run that forgot states about itself, in a form that an auditor can check against the files."""

import json
import pickle
import secrets
from collections.abc import Iterable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.data.manifest import Manifest
from lqf_lightning.deletion.content_hash import cohort_hash, file_hash, tensors_hash
from lqf_lightning.run_folder import write_json

NAME = "certificate.json"
_FILES = ("config.yaml", "report.json")
_MANIFEST = "manifest.parquet"


def write_certificate(
    folder: Path, checkpoint: Path, prefix: str, contents: Iterable[str], statement: Mapping[str, Any]
) -> str:
    """Write ``certificate.json`` beside everything that it is about, which has to be there already.

    The hashes are of the released weights (noise included), of all other tensors of its state dict (the
    pre-trained network), of the configuration, the report and the retained samples (contents and labels), each of which
    can be computed again from the folder; and of the cohort, which only the holder of the receipt can compute again.
    Not covered: other entries of the checkpoint, ``report.html``, validation and test samples, and this file itself,
    which is not signed; ``forgetting.json`` keeps its hash.

    Args:
        folder: The new run folder, with ``config.yaml``, ``manifest.parquet`` and perhaps ``report.json``.
        checkpoint: File with the released weights, inside the folder.
        prefix: What the names of the released weights begin with in its state dict.
        contents: Content hashes of the cohort, from the column `sha` of the manifest that the old run wrote.
        statement: Plain values: what was requested and done, the bound (nats), the distance, the noise, the date.

    Returns:
        The receipt: the salt of the cohort's hash. It is written nowhere: hand it to the requester.
    """
    salt, contents = secrets.token_hex(16), list(contents)
    content = {
        "format": 1,
        "statement": dict(statement),
        "versions": {name: version(name) for name in ("lqf-lightning", "torch")},
        "checkpoint": {"file": checkpoint.relative_to(folder).as_posix(), "prefix": prefix},
        "weights": _weights(checkpoint, prefix),
        "files": {name: file_hash(folder / name) for name in _FILES if (folder / name).is_file()},
        "retained": _retained(folder),
        "cohort": {"number": len(contents), "sha256": cohort_hash(contents, salt)},
    }
    write_json(folder / NAME, content)
    return salt


def verify_certificate(folder: Path) -> list[str]:
    """Compare a run folder with its certificate.

    Args:
        folder: The run folder.

    Returns:
        What does not agree, in words; empty if everything does.
    """
    stated = read_certificate(folder)
    checkpoint = folder / stated["checkpoint"]["file"]
    found: dict[str, str] = {}
    for name, known in stated["files"].items():
        now = file_hash(folder / name) if (folder / name).is_file() else "missing"
        found |= {} if now == known else {name: f"{name} is {now}, the certificate says {known}"}
    if not checkpoint.is_file():
        return [*found.values(), f"{checkpoint.name} is missing"]
    if not (folder / _MANIFEST).is_file():
        return [*found.values(), f"{_MANIFEST} is missing"]
    try:
        weights = _weights(checkpoint, stated["checkpoint"]["prefix"])
    except (RuntimeError, KeyError, EOFError, pickle.UnpicklingError) as error:
        return [*found.values(), f"{checkpoint.name} cannot be read ({str(error).partition(chr(10))[0]})"]
    for name, now in weights.items():
        known = stated["weights"][name]
        found |= {} if now == known else {name: f"the {name} weights are {now}, the certificate says {known}"}
    if (now_retained := _retained(folder)) != (known_retained := stated["retained"]):
        found["retained"] = f"the retained samples are {now_retained}, the certificate says {known_retained}"
    return list(found.values())


def is_about(folder: Path, contents: Iterable[str], receipt: str) -> bool:
    """Tell whether a certificate is about certain samples.

    Args:
        folder: The run folder.
        contents: Content hashes of the samples: BLAKE2b of 20 bytes, as in the column `sha` of manifests.
        receipt: What `write_certificate` returned.

    Returns:
        Whether these and no others are the cohort.
    """
    stated: str = read_certificate(folder)["cohort"]["sha256"]
    return stated == cohort_hash(contents, receipt)


def read_certificate(folder: Path) -> dict[str, Any]:
    """Read ``certificate.json``.

    Args:
        folder: The run folder.

    Returns:
        Its content.

    Raises:
        FileNotFoundError: There is none.
    """
    file = folder / NAME
    if not file.is_file():
        raise FileNotFoundError(f"no certificate at {file}; give the folder that lqf-forget wrote")
    content: dict[str, Any] = json.loads(file.read_text())
    return content


def _weights(checkpoint: Path, prefix: str) -> dict[str, str]:
    state: dict[str, Tensor] = torch.load(checkpoint, map_location="cpu", weights_only=True, mmap=True)["state_dict"]
    released = {name: value for name, value in state.items() if name.startswith(prefix)}
    base = {name: value for name, value in state.items() if name not in released}
    return {"released": tensors_hash(released), "base": tensors_hash(base)}


def _retained(folder: Path) -> dict[str, Any]:
    rows = Manifest.read(folder / _MANIFEST).training_rows()
    lines = [f"{row.sha} {row.label}" for row in rows.itertuples(index=False)]
    return {"number": len(rows), "sha256": cohort_hash(lines, "retained")}
