"""What stays of a sample that was forgotten on request: its index, and a name that only its own path gives."""

from collections.abc import Iterable
from hashlib import blake2b

import numpy as np
import numpy.typing as npt
import pandas as pd

_PREFIX = "forgotten:"


def tombstone_name(path: str, key: str) -> str:
    """The name that takes the place of a path: keyed BLAKE2b, equal for equal paths.

    A path cannot be read from it. Whoever holds the key, which the manifest has to keep so that the file is known
    again, can still test a path that they guess.

    Args:
        path: Of the sample.
        key: Of the manifest, in hexadecimal.

    Returns:
        The name.

    Example:
        >>> tombstone_name("train/bee/004.png", "00ff")
        'forgotten:ef1eb665742798d14fcf045ff92cd5d1'
    """
    return _PREFIX + blake2b(path.encode(), digest_size=16, key=bytes.fromhex(key)).hexdigest()


def is_tombstone(paths: "pd.Series[str]") -> npt.NDArray[np.bool_]:
    """Tell the rows of forgotten samples from others.

    Args:
        paths: The column of a manifest (N,).

    Returns:
        Mask (N,).
    """
    return paths.str.startswith(_PREFIX).to_numpy(dtype=bool)


def tombstone_key(paths: Iterable[str]) -> str:
    """A key that no other set of samples has; every process finds the same.

    Args:
        paths: Of all samples.

    Returns:
        16 bytes in hexadecimal.
    """
    return blake2b("\0".join(paths).encode(), digest_size=16, person=b"tombstones").hexdigest()


def bury(table: pd.DataFrame, rows: npt.NDArray[np.int64], key: str) -> pd.DataFrame:
    """Take everything but the index and the split out of some rows of a manifest.

    Args:
        table: All rows, in order of index.
        rows: Indices of the samples; those that are tombstones already stay what they are.
        key: Of the manifest, in hexadecimal.

    Returns:
        A new table.
    """
    rows = rows[~is_tombstone(table["path"])[rows]]
    names = [tombstone_name(path, key) for path in table.loc[rows, "path"]]
    table = table.copy()
    table.loc[rows, "path"] = names
    table.loc[rows, ["label", "true_label"]] = -1
    table.loc[rows, ["class", "sha", "core"]] = ""
    table.loc[rows, ["used", "labeled"]] = False
    table.loc[rows, "removed"] = True
    return table


def without_buried(table: pd.DataFrame, previous: pd.DataFrame, key: str) -> pd.DataFrame:
    """Leave out samples that were forgotten, but whose files are still there.

    Args:
        table: Rows of the samples that are there.
        previous: Rows of an earlier manifest.
        key: Of that manifest, in hexadecimal; empty where nothing was forgotten.

    Returns:
        The other rows.
    """
    if not key:
        return table
    known = set(previous.loc[is_tombstone(previous["path"]), "path"])
    return table[[tombstone_name(path, key) not in known for path in table["path"]]]
