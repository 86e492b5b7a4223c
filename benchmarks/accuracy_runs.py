"""One `lqf-train` per case of the accuracy benchmark; what is finished is kept."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd

_KEPT = "+callbacks.kept_answers._target_=kept_answers.KeptAnswers"
_QUIET = ("logger=csv", "progress=none")


def run(folder: Path, overrides: Sequence[str], *, observe: Sequence[str] = ("learning_curves",)) -> dict[str, Any]:
    """Train and test once, in a process of its own; a folder with final metrics is not run again.

    Args:
        folder: The run folder.
        overrides: Of Hydra.
        observe: Callbacks.

    Returns:
        The final metrics.
    """
    metrics = folder / "metrics.json"
    if not (metrics.exists() and "test/acc" in json.loads(metrics.read_text())):
        observers = f"callbacks=[{','.join(observe)}]"
        command = [sys.executable, "-m", "lqf_lightning.train", *overrides, *_QUIET, observers, _KEPT]
        path = {"PYTHONPATH": str(Path(__file__).parent)}
        subprocess.run(
            [*command, f"hydra.run.dir={folder}"], check=True, stdout=subprocess.DEVNULL, env=_environment(path)
        )
    return {name: float(value) for name, value in json.loads(metrics.read_text()).items()}


def answers(folder: Path) -> pd.Series:
    """Whether each test image was answered rightly.

    Args:
        folder: A finished run folder.

    Returns:
        Booleans by index.
    """
    table = pd.read_parquet(folder / "answers.parquet").set_index("index")
    return table["label"] == table["prediction"]


def drop_checkpoints(folder: Path) -> None:
    """Free the disk: a case needs its metrics and answers only."""
    for file in (folder / "checkpoints").glob("*.ckpt"):
        file.unlink()


def _environment(extra: dict[str, str]) -> dict[str, str]:
    import os

    known = os.environ.get("PYTHONPATH")
    joined = extra["PYTHONPATH"] if not known else f"{extra['PYTHONPATH']}{os.pathsep}{known}"
    return {**os.environ, "PYTHONPATH": joined}
