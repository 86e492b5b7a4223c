"""Tables of predictions that people bring, checked before anything relies on them."""

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from torch import Tensor

_NEEDED = ("index", "prediction")


def checked_predictions(table: pd.DataFrame, classes: Sequence[str], name: str) -> pd.DataFrame:
    """Check a table, column by column.

    Args:
        table: A row per sample, see `StoredPredictions`.
        classes: Class names that may be predicted.
        name: What to call the table.

    Returns:
        The table with `index` as int64 and `prediction` as text.

    Raises:
        ValueError: A column is missing or holds what it must not.
    """
    missing = [column for column in _NEEDED if column not in table]
    if missing:
        raise ValueError(f"{name} has the columns {list(table)}, expected `index` and `prediction`; add {missing}")
    for column in _NEEDED:
        if table[column].isna().any():
            raise ValueError(f"{name} has rows without `{column}`, expected one in each; leave these rows out")
    index = pd.to_numeric(table["index"], errors="coerce")
    if isinstance(table["index"].iloc[0] if len(table) else 0, str) or (index % 1 != 0).any():
        raise ValueError(
            f"{name} has `index` of type {table['index'].dtype}, expected rows of the manifest, as integers"
        )
    if index.duplicated().any():
        twice = index[index.duplicated()].iloc[0]
        raise ValueError(f"{name} has several predictions for index {twice}, expected one per sample")
    prediction = table["prediction"].astype(str)
    odd = sorted(set(prediction) - set(classes))
    if odd:
        raise ValueError(f"{name} predicts {odd[:5]}, which are not among its classes {list(classes)[:5]}...")
    if "confidence" in table and not pd.api.types.is_numeric_dtype(table["confidence"]):
        raise ValueError(f"{name} has `confidence` of type {table['confidence'].dtype}, expected probabilities")
    return table.assign(index=index.astype("int64"), prediction=prediction)


def stacked_logits(table: pd.DataFrame, classes: Sequence[str], name: str) -> Tensor:
    """Bring the column `logits` into one tensor.

    Args:
        table: A checked table of n rows.
        classes: Class names, in the order of the logits.
        name: What to call the table.

    Returns:
        Logits (n, C) in single precision.

    Raises:
        ValueError: A row has another length, or its largest number is not that of the prediction.
    """
    lengths = {len(row) for row in table["logits"]}
    if lengths - {len(classes)}:
        raise ValueError(
            f"{name} has logits of lengths {sorted(lengths)}, expected one number for each of {len(classes)} classes"
        )
    rows = np.stack(table["logits"].to_list()) if len(table) else np.zeros((0, len(classes)))
    logits = torch.from_numpy(rows.astype(np.float32))
    place = {label: position for position, label in enumerate(classes)}
    predicted = torch.tensor([place[label] for label in table["prediction"]], dtype=torch.int64)
    other = logits.gather(1, predicted[:, None])[:, 0] < logits.amax(1) if len(table) else predicted.bool()
    if bool(other.any()):
        first = int(other.nonzero()[0])
        raise ValueError(
            f"{name} predicts {table['prediction'].iloc[first]} for index {table['index'].iloc[first]}, but its logits "
            f"are largest for {classes[int(logits[first].argmax())]}. Write the logits in the order of `classes`"
        )
    return logits
