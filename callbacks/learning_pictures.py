"""Pictures of how a run learned its samples."""

import math
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

from .flip_pictures import shorten

_BINS = 20
_CLASSES = 30
_COLUMNS = 8


def draw_learning(table: pd.DataFrame) -> Figure:
    """How many samples were right in how many epochs, altogether and by class.

    Args:
        table: As of `tabulate_learning`.

    Returns:
        A figure of two panels. Of many classes, the 30 that were learned most slowly.
    """
    known = table[table["epochs"] > 0]
    means = known.groupby("class")["cumulative_correctness"].mean().sort_values(kind="stable")
    names, edges = list(means.index[:_CLASSES]), np.linspace(0, 1, _BINS + 1)
    figure = Figure(figsize=(10, max(3.6, 1.5 + 0.25 * len(names))), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.hist(known["cumulative_correctness"], bins=edges)
    left.set(xlabel="cumulative correctness", ylabel="training samples", xlim=(0, 1))
    left.yaxis.set_major_locator(MaxNLocator(integer=True))
    rows = [np.histogram(known.loc[known["class"] == name, "cumulative_correctness"], edges)[0] for name in names]
    shares = np.array([row / row.sum() for row in rows])
    image = right.imshow(shares, aspect="auto", cmap="Blues", extent=(0, 1, len(names) - 0.5, -0.5), vmin=0, vmax=1)
    right.set_yticks(range(len(names)), [shorten(name) for name in names], parse_math=False)
    right.set(xlabel="cumulative correctness")
    figure.colorbar(image, label="share of the class")
    kept = f", {_CLASSES} of {len(means)} classes" if len(means) > _CLASSES else ""
    forgotten = int((known["forgetting_events"] > 0).sum())
    never = int(known["never_learned"].sum())
    figure.suptitle(
        f"{len(known)} training samples, {never} never learned, {forgotten} forgotten at least once{kept}",
        fontsize="medium",
    )
    return figure


def draw_extremes(shown: pd.DataFrame, images: Sequence[Image.Image], name: str) -> Figure:
    """Show samples with their class and how often they were right.

    Args:
        shown: Rows of `tabulate_learning` (B).
        images: The samples (B).
        name: "hardest" or "easiest".

    Returns:
        A figure.
    """
    columns, rows = max(1, min(_COLUMNS, len(images))), max(1, math.ceil(len(images) / _COLUMNS))
    figure = Figure(figsize=(max(1.5 * columns, 6), 1.8 * rows + 0.6), layout="constrained")
    figure.suptitle(f"{name} training samples: class and cumulative correctness", fontsize="medium")
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    for axes, image, label, share in zip(
        panels, images, shown["class"], shown["cumulative_correctness"], strict=False
    ):  # fewer images than panels
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.set_title(f"{shorten(label)} {share:.2f}", fontsize=7, parse_math=False)
    return figure
