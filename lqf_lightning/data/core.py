"""The training samples that will never have to be forgotten, and the parts that they make of a data set."""

import json
import logging
from collections.abc import Mapping
from hashlib import sha256
from typing import Any, Literal, cast

import numpy as np
import numpy.typing as npt

from lqf_lightning.data.cohort import Cohort
from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.option import check_option
from lqf_lightning.data.selection import choose_fraction_per_class, draw_lots

log = logging.getLogger(__name__)
Part = Literal["all", "core", "user"]


def refuse_part(core: object, part: str) -> None:
    """Check the options alone.

    Args:
        core: What `data.core` says.
        part: What `data.part` says.

    Raises:
        ValueError: The part has another name, or `core` asks for no share of the samples.
    """
    check_option("part", part, part in ("all", "core", "user"), "all, core or user", "user")
    if not (isinstance(core, Mapping) and "fraction" in core):
        return
    if unknown := set(core) - {"fraction", "seed"}:
        raise ValueError(
            f"`core` got {sorted(unknown)} beside fraction, expected fraction and seed only. Set "
            "data.core={fraction:0.5,seed:0}"
        )
    share = core["fraction"]
    valid = isinstance(share, (int, float)) and 0 < share < 1
    check_option("core", f"fraction {share}", valid, "a fraction above 0 and below 1", "{fraction:0.5,seed:0}")


def mark_core(manifest: Manifest, core: Any, previous: Manifest | None = None) -> None:
    """Write into the manifest which training samples are core data; what an earlier run was told stands.

    A fraction is drawn by lot from every class, at least one sample, and leaves at least one; every other choice is one
    of `Cohort.parse`. Where the core has been chosen before, later files are no part of it: nothing was trained on
    them.

    Args:
        manifest: The samples, changed in place.
        core: What `data.core` says; None chooses none.
        previous: Manifest of an earlier run, with which this one is aligned.

    Raises:
        ValueError: The earlier run had another core, or `core` names no samples that could be.
    """
    settled = set() if previous is None else set(previous.table["core"]) - {""}
    if core is None:
        return
    told = _in_words(core)
    if not settled:
        manifest.table.loc[manifest.table["index"].isin(_choose(core, manifest)), "core"] = told
    elif settled != {told}:
        raise ValueError(
            f"data.core={told} is another core than that of the run that data.manifest describes, "
            f"{', '.join(sorted(settled))}. Set data.core=null to keep that one, or data.manifest=null to choose afresh"
        )


def keep_part(manifest: Manifest, part: Part) -> list[int]:
    """Leave out the training samples of the other part; samples of no known class are never core data.

    Args:
        manifest: The samples with their core, changed in place.
        part: Which to keep: "core", "user" (all others) or "all".

    Returns:
        Positions of the classes of which the part has no training sample, but the data set has.

    Raises:
        ValueError: There is no core, or nothing is left.
    """
    if part == "all":
        return []
    table = manifest.table
    core = table["core"] != ""
    if not core.any():
        raise ValueError(
            f"data.part={part} needs to know the core data, got none. Set data.core={{fraction:0.5,seed:0}}, or "
            "data.manifest to that of the run on the core, or data.part=all"
        )
    learned_from = table["split"].isin(["train", "unlabeled"])
    table.loc[learned_from & (core if part == "user" else ~core), "used"] = False
    present = set(manifest.rows("train")["true_label"])
    if not present:
        raise ValueError(
            f"data.part={part} leaves no labeled training samples. Set another data.core, or data.part=all"
        )
    absent = [position for position in range(len(manifest.classes)) if position not in present]
    if absent:
        names = [manifest.classes[position] for position in absent]
        listed = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
        log.info("data.part=%s has no images of %d of %d classes: %s", part, len(absent), len(manifest.classes), listed)
    return absent


def _choose(core: Any, manifest: Manifest) -> npt.NDArray[np.int64]:
    if not (isinstance(core, Mapping) and "fraction" in core):
        try:
            return Cohort.parse(core, manifest).indices.numpy()
        except (ValueError, FileNotFoundError) as error:
            raise ValueError(f"data.core={core} chooses no core data: {error}") from error
    train = manifest.rows("train")
    lots = draw_lots(train["path"], int(core.get("seed", 0)), "core")
    chosen = choose_fraction_per_class(lots, train["true_label"].tolist(), float(core["fraction"]))
    return cast(npt.NDArray[np.int64], train["index"].to_numpy()[chosen])


def _in_words(core: Any) -> str:
    # Stands beside every sample of the core, so a long list is named by its hash.
    if isinstance(core, Mapping) and "fraction" in core:
        core = {"fraction": float(core["fraction"]), "seed": int(core.get("seed", 0))}
    words = json.dumps(core, sort_keys=True, default=str)
    return words if len(words) <= 200 else f"sha256 {sha256(words.encode()).hexdigest()}"
