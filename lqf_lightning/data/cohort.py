"""The training samples that a request names: to forget them, or to study what they did."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.sample_file import read_named
from lqf_lightning.data.selection import choose_lowest, draw_lots

_FORMS = (
    "Expected a list of indices or paths, a file of them, {class: NAME}, {classes: [NAME, NAME]}, "
    "{fraction: 0.01, seed: 0} or all; set cohort=[3,17]"
)


@dataclass(frozen=True)
class Cohort:
    """A named set of training samples.

    Attributes:
        indices: Of the samples (K,), int64, ascending.
        spec: How they were asked for, in words that name none of them.

    Example:
        >>> manifest = Manifest.build([("train", "a/0", 0), ("train", "a/1", 0), ("train", "b/0", 1)], ["a", "b"])
        >>> Cohort.parse({"class": "a"}, manifest)
        Cohort(indices=tensor([0, 1]), spec='class a')
        >>> Cohort.parse(["b/0"], manifest).indices.tolist()
        [2]
    """

    indices: Tensor
    spec: str

    def __len__(self) -> int:
        """Count the samples.

        Returns:
            Their number K.
        """
        return len(self.indices)

    @classmethod
    def parse(cls, spec: Any, manifest: Manifest, *, core: Tensor | None = None, whole: bool = False) -> Self:
        """Find the samples that a request means.

        Args:
            spec: Indices or paths (a list); a file of them (Parquet, CSV or JSON with a column index or path, or a text
                file with one per line); ``{"class": name}`` or ``{"classes": [...]}``, by the label that the run was
                told; ``{"fraction": 0.01, "seed": 0}`` of the training samples, drawn by lot; or "all".
            manifest: Of the run. Members are training samples that it used with their labels.
            core: Indices of data that is never forgotten; classes, fractions and "all" leave it out by themselves.
            whole: Whether all training samples that are not core data may be meant.

        Returns:
            The cohort.

        Raises:
            ValueError: Nothing or everything is meant, a sample is none of the run's, or one is core data.
        """
        kept = np.zeros(0, np.int64) if core is None else core.cpu().numpy()
        used = manifest.rows("train")
        free = used[~used["index"].isin(kept)]
        found, words = _find(spec, manifest, free)
        if len(protected := np.intersect1d(found, kept)):
            raise ValueError(
                f"cohort: {len(protected)} of {len(found)} samples are core data, which the promise to forget does not "
                f"cover; the first is index {protected[0]}. Take them out of the cohort, or train on another core"
            )
        _refuse_strangers(found, manifest, set(used["index"]))
        if len(found) == len(free) and not whole:
            raise ValueError(
                f"cohort={words} means all {len(free)} training samples: nothing would be left to train on. Delete the "
                "run instead, or ask for fewer samples, as in cohort={fraction: 0.01, seed: 0}"
            )
        return cls(torch.from_numpy(np.array(found, dtype=np.int64)), words)


def _find(spec: Any, manifest: Manifest, free: Any) -> tuple[npt.NDArray[np.int64], str]:
    if isinstance(spec, str) and spec == "all":
        return _some(free["index"].to_numpy(), "all"), "all"
    if isinstance(spec, Mapping):
        return _find_by_property(dict(spec), manifest, free)
    if isinstance(spec, str | Path):
        found = read_named(spec, manifest, "cohort")
        return found, f"{len(found)} samples of a {Path(spec).suffix} file"
    single = isinstance(spec, int | np.integer) and not isinstance(spec, bool)
    if not single and not isinstance(spec, Sequence):
        raise ValueError(f"cohort={spec} is a {type(spec).__name__}. {_FORMS}")
    entries = [spec] if single else list(spec)
    found = read_named(_some(entries, "[]"), manifest, "cohort")
    return found, f"{len(found)} samples by name"


def _find_by_property(spec: dict[str, Any], manifest: Manifest, free: Any) -> tuple[npt.NDArray[np.int64], str]:
    if set(spec) in ({"class"}, {"classes"}):
        asked = spec["class"] if "class" in spec else spec["classes"]
        names = [
            str(name) for name in ([asked] if isinstance(asked, str) or not isinstance(asked, Sequence) else asked)
        ]
        if unknown := [name for name in names if name not in manifest.classes]:
            raise ValueError(f"cohort: no class is called {', '.join(unknown)}. Expected some of {manifest.classes}")
        words = f"class{'es' if len(names) > 1 else ''} {', '.join(names)}"
        return _some(free.loc[free["class"].isin(names), "index"].to_numpy(), words), words
    if set(spec) in ({"fraction"}, {"fraction", "seed"}):
        fraction, seed = spec["fraction"], spec.get("seed", 0)
        if isinstance(fraction, bool) or not isinstance(fraction, int | float) or not 0 < fraction <= 1:
            raise ValueError(
                f"cohort: got a fraction of {fraction}, expected a number above 0 and at most 1. Set "
                "cohort={fraction: 0.01, seed: 0}"
            )
        if isinstance(seed, bool) or not isinstance(seed, int):
            raise ValueError(
                f"cohort: got the seed {seed}, expected a whole number. Set cohort={{fraction: 0.01, seed: 0}}"
            )
        lots = draw_lots(free["path"], seed, "cohort")
        words = f"fraction {fraction:g}, seed {seed}"
        return _some(free["index"].to_numpy()[choose_lowest(lots, round(fraction * len(free)))], words), words
    raise ValueError(f"cohort has the keys {sorted(map(str, spec))}. {_FORMS}")


def _some(found: Any, words: str) -> Any:
    if not len(found):
        raise ValueError(f"cohort={words} is empty: there is nothing to forget. {_FORMS}")
    return found


def _refuse_strangers(found: npt.NDArray[np.int64], manifest: Manifest, used: set[int]) -> None:
    strangers = [int(index) for index in found if int(index) not in used]
    if not strangers:
        return
    first = strangers[0]
    row = manifest.table.loc[first]
    if manifest.forgotten[first]:
        why = "was forgotten by an earlier request"
    elif row["removed"]:
        why = "was gone already when the run began"
    else:
        why = "was not used by the run" if not row["used"] else "was used without its label"
    raise ValueError(
        f"cohort: {len(strangers)} of {len(found)} samples are none that the run was trained on; the first is index "
        f"{first}, which {why}. Take them out of the cohort"
    )
