"""Samples as a folder may name them: by index and by path."""

import json
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any
from urllib.parse import quote

import numpy as np
import numpy.typing as npt
import pandas as pd

_LONGER = rb"[A-Za-z0-9_/-]|\.+[A-Za-z0-9_/-]"  # a full stop at the end of a sentence is no longer name


class Traces:
    """Recognizes the samples of a request in tables, texts and bytes.

    Args:
        indices: Of the samples.
        paths: Of the samples, as the manifest named them.

    Attributes:
        indices: The same, as a set.
        paths: The same, as a set.
    """

    def __init__(self, indices: Iterable[int], paths: Iterable[str]) -> None:
        self.indices = {int(index) for index in indices}
        self.paths = {str(path) for path in paths}
        # A path is none where a longer name goes on: digits/1 is not in digits/17. Shorter names, as blue/003.png of
        # train/blue/003.png, are no evidence: other splits have them too. Writers of JSON escape what is not ASCII, and
        # some the slash; those of pages and addresses escape other characters.
        names = {form for path in self.paths for form in (path, json.dumps(path)[1:-1], escape(path), quote(path))}
        names |= {name.replace("/", "\\/") for name in names}
        texts = b"|".join(re.escape(name.encode()) for name in sorted(names, key=len, reverse=True))
        self._pattern = re.compile(rb"(?<![A-Za-z0-9_])(?:" + texts + rb")(?!" + _LONGER + rb")") if texts else None

    def in_bytes(self, content: bytes) -> bool:
        """Whether a path stands in a text, or anywhere else.

        Args:
            content: The bytes.

        Returns:
            Whether one does.
        """
        return self._pattern is not None and self._pattern.search(content) is not None

    def rows(self, table: pd.DataFrame) -> npt.NDArray[np.bool_]:
        """Which rows of a table are about the samples.

        Args:
            table: With a column `index` or `path`, or both.

        Returns:
            Mask (N,).
        """
        found = np.zeros(len(table), dtype=bool)
        if "index" in table:
            found |= pd.to_numeric(table["index"], errors="coerce").isin(self.indices).to_numpy()
        if "path" in table:
            found |= table["path"].astype(str).isin(self.paths).to_numpy()
        return found

    def in_lists(self, content: Any, key: str = "") -> bool:
        """Whether plain values, as of a JSON file, hold a list under a key such as `index` that names a sample.

        Args:
            content: The values.
            key: Under which they stand.

        Returns:
            Whether one does.
        """
        if isinstance(content, dict):
            return any(self.in_lists(value, str(name)) for name, value in content.items())
        if isinstance(content, Sequence) and not isinstance(content, str | bytes):
            return any(self.in_lists(value, key) for value in content)
        return names_samples(key) and isinstance(content, int) and content in self.indices


def names_samples(key: str) -> bool:
    """Whether a column, tensor or key holds indices or paths of samples, by its name.

    Args:
        key: The name.

    Returns:
        Whether it does.
    """
    return re.search(r"(^|[._/ ])(index|indices|path|paths)$", key) is not None
