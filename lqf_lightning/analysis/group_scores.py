"""What groups of training samples tell: the optimum of a run without all of a group, exactly."""

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import pandas as pd
import torch
from pyarrow import ArrowInvalid
from torch import Tensor

from lqf_lightning.analysis.run_problem import RunProblem
from lqf_lightning.data import Manifest
from lqf_lightning.information import function_information, weight_information
from lqf_lightning.linear import leave_group_out

Watch = Callable[[Sequence[Tensor]], Iterable[Tensor]]


def group_positions(groups: str, run: RunProblem, manifest: Manifest) -> dict[str, Tensor]:
    """Find the samples of each group.

    Args:
        groups: "class", or a Parquet file with the columns `index` and `group`.
        run: The problem.
        manifest: The samples of the run.

    Returns:
        Positions among the training samples by name of the group, groups without training samples left out.

    Raises:
        ValueError: The file has other columns, or names no training sample.
    """
    if groups == "class":
        return {
            name: torch.nonzero(run.table.label == position).flatten()
            for position, name in enumerate(manifest.classes)
            if bool((run.table.label == position).any())
        }
    table = read_groups(groups)
    place = {index: position for position, index in enumerate(run.table.index.tolist())}
    known = table[table["index"].isin(list(place))]
    if known.empty:
        raise ValueError(
            f"{groups} names no training sample of this run: its `index` must be that of the run's manifest.parquet. "
            "Set callbacks.sample_information.groups=class"
        )
    device = run.table.index.device
    return {
        str(name): torch.tensor([place[index] for index in rows["index"]], device=device)
        for name, rows in known.groupby("group")
    }


def read_groups(file: str | Path) -> pd.DataFrame:
    """Read which sample belongs to which group.

    Args:
        file: Parquet, with the columns `index` and `group`.

    Returns:
        The table, every pair once.

    Raises:
        ValueError: There is no such file, it is no Parquet file, or it has other columns.
    """
    if not Path(file).is_file():
        raise ValueError(
            f"no groups at {Path(file).absolute()}: expected a Parquet file with the columns index and group. Set "
            "callbacks.sample_information.groups=class"
        )
    try:
        table = pd.read_parquet(file)
    except (ArrowInvalid, OSError) as error:
        raise ValueError(
            f"{file} is no Parquet file: {error}. Set callbacks.sample_information.groups=class"
        ) from error
    if not {"index", "group"} <= set(table.columns):
        raise ValueError(
            f"{file} has the columns {list(table.columns)}, expected index and group. Set "
            "callbacks.sample_information.groups=class"
        )
    return table[["index", "group"]].drop_duplicates()


def score_groups(run: RunProblem, groups: dict[str, Tensor], sigma: float = 1.0, watch: Watch = iter) -> pd.DataFrame:
    """Remove every group in turn.

    Args:
        run: The problem, at its optimum.
        groups: Positions of the samples of each group.
        sigma: Deviation of the noise that smooths weights and outputs.
        watch: Wraps the groups, for a progress bar.

    Returns:
        A row per group, the most informative first: `group`, `samples`, `weight_information`,
        `function_information` (nats; NaN without validation images), and `accuracy_without`, that of the model without
        the group on the samples of the group.
    """
    removed = leave_group_out(run.factor(), list(groups.values()), run.cross, watch)
    change = removed.function_change
    right = [
        float(((run.problem.target[rows] - residual).argmax(1) == run.table.label[rows]).double().mean())
        for rows, residual in zip(groups.values(), removed.residual, strict=True)
    ]
    table = pd.DataFrame({"group": list(groups), "samples": [len(rows) for rows in groups.values()]})
    table["weight_information"] = weight_information(removed.weight_change, sigma).tolist()
    table["function_information"] = float("nan") if change is None else function_information(change, sigma).tolist()
    table["accuracy_without"] = right
    by = "weight_information" if change is None else "function_information"
    return table.sort_values(by, ascending=False, kind="stable").reset_index(drop=True)
