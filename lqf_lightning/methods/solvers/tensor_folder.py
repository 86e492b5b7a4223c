"""Tensors kept in a folder, one file each, so that long work goes on where it was interrupted."""

import hashlib
import os
from collections.abc import Iterator, MutableMapping
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

_KEY = "key"


class TensorFolder(MutableMapping[str, Tensor]):
    """A mapping on disk. A file appears under its name only when it is complete.

    Args:
        path: The folder; made if it does not exist.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.path.mkdir(parents=True, exist_ok=True)

    def __setitem__(self, key: str, tensor: Tensor) -> None:
        final = self._file(key)
        partial = final.with_suffix(f".{os.getpid()}.partial")
        save_file({"tensor": tensor.contiguous()}, partial, metadata={_KEY: key})
        partial.replace(final)

    def __getitem__(self, key: str) -> Tensor:
        if not self._file(key).exists():
            raise KeyError(key)
        return load_file(self._file(key))["tensor"]

    def __delitem__(self, key: str) -> None:
        if not self._file(key).exists():
            raise KeyError(key)
        self._file(key).unlink()

    def __iter__(self) -> Iterator[str]:
        for file in sorted(self.path.glob("*.safetensors")):
            with safe_open(file, "pt") as content:
                yield content.metadata()[_KEY]

    def __len__(self) -> int:
        return len(list(self.path.glob("*.safetensors")))

    def _file(self, key: str) -> Path:
        return self.path / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.safetensors"
