"""Things that are known about samples besides their labels."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from lqf_lightning.data import Manifest

LABEL = "label"


class Variables:
    """Discrete variables by sample, from files.

    Args:
        files: By name of a variable, a Parquet file with the columns `index` (of the manifest) and that name.

    Attributes:
        names: Names of the variables, the label not among them.

    Raises:
        ValueError: A file lacks a column, names a sample twice or leaves a value open, or a variable has the name of
            the label.
    """

    def __init__(self, files: Mapping[str, str | Path]) -> None:
        self._tables = {name: _read(name, Path(file)) for name, file in files.items()}
        self.names = tuple(self._tables)

    def check(self, manifest: Manifest, splits: Sequence[str]) -> None:
        """Refuse variables that are not known of every sample.

        Args:
            manifest: The samples of the run.
            splits: The splits that are looked at.

        Raises:
            ValueError: A file has no row for some sample.
        """
        needed = pd.Index([row for split in splits for row in manifest.rows(split)["index"]])
        for name, values in self._tables.items():
            missing = needed.difference(values.index)
            if len(missing):
                raise ValueError(
                    f"the variable {name} is not known of {len(missing)} samples of {', '.join(splits)} (the first has "
                    f"the index {missing[0]}). Set callbacks.usable_information.targets={{{name}: FILE.parquet}} "
                    "to a file that has them"
                )

    def codes(self, label: Tensor, index: Tensor, classes: int) -> dict[str, tuple[Tensor, int]]:
        """Number the values.

        Args:
            label: Class positions (n,).
            index: Rows of the manifest (n,).
            classes: Number of classes.

        Returns:
            By variable, `label` first: values from 0 (n,), in ascending order of the originals, and their number.
        """
        found = {LABEL: (label, classes)}
        for name, values in self._tables.items():
            codes, levels = pd.factorize(values, sort=True)
            numbered = pd.Series(codes, index=values.index)
            found[name] = (torch.tensor(numbered.loc[index.tolist()].to_numpy(), dtype=torch.int64), len(levels))
        return found


def _read(name: str, file: Path) -> "pd.Series[Any]":
    override = f"Set callbacks.usable_information.targets={{{name}: FILE.parquet}}"
    if name == LABEL:
        raise ValueError("`label` is always among the variables; give the other one another name in targets")
    if not file.exists():
        raise ValueError(f"there is no file {file} with the variable {name}. {override}")
    table = pd.read_parquet(file)
    if lacking := [column for column in ("index", name) if column not in table]:
        raise ValueError(f"{file} has the columns {list(table)}, expected also {lacking}. {override}")
    if table["index"].duplicated().any() or table[name].isna().any():
        raise ValueError(f"{file} names a sample twice or leaves {name} open, expected one value by index. {override}")
    return table.set_index("index")[name]
