"""Data that is no longer what a run was trained on, so that its optimum says nothing about what is left."""

import pandas as pd
from torch import Tensor

from lqf_lightning.data.manifest import Manifest

_SHOWN = 5


def refuse_changed_data(previous: Manifest, now: Manifest, cohort: Tensor) -> None:
    """Check that a run that is to forget some samples still has all the others, and no more.

    What earlier requests took away is recorded in the manifest and no change. Files of the cohort itself may be gone.

    Args:
        previous: Manifest that the run wrote.
        now: Manifest of the run as it has been opened again, numbered alike.
        cohort: Indices of the samples that are to be forgotten (K,).

    Raises:
        ValueError: Training samples have come, gone or changed; the message names them and says what to do.
    """
    before, after = previous.training_rows(), now.training_rows()
    came = after[~after["index"].isin(before["index"])]
    if len(came):
        raise ValueError(
            f"{len(came)} training samples are not those of the run: {_names(came)}. Move new files out of the data "
            "set until the request is answered, or train a new run with them; options of `data` that choose samples "
            "have to be those of the run"
        )
    went = before[~before["index"].isin([*after["index"], *cohort.tolist()])]
    if len(went):
        raise ValueError(
            f"{len(went)} training samples of the run are gone without a request: {_names(went)}. Bring the files "
            "back, or add them to the cohort, so that they are forgotten too"
        )
    both = before.merge(after, on="index", suffixes=("", "_now"))
    hashed = (both["sha"] != "") & (both["sha_now"] != "")
    changed = both[(hashed & (both["sha"] != both["sha_now"])) | (both["label"] != both["label_now"])]
    if len(changed):
        raise ValueError(
            f"{len(changed)} training samples have other contents or labels than in the run: {_names(changed)}. "
            "Restore the files, or train a new run"
        )


def _names(rows: pd.DataFrame) -> str:
    shown = ", ".join(rows["path"].iloc[:_SHOWN])
    return shown + (", ..." if len(rows) > _SHOWN else "")
