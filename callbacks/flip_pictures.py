"""Pictures of an upgrade: what was right and is wrong now, and which class is taken for which."""

import math
from collections.abc import Sequence

import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image

_COLUMNS = 8
_CLASSES = 30
_LETTERS = 20


def draw_flips(flips: pd.DataFrame, images: Sequence[Image.Image], title: str) -> Figure:
    """Show samples with what both models say.

    Args:
        flips: As of `tabulate_flips` (B rows).
        images: The samples (B).
        title: What this is.

    Returns:
        A figure; over every sample what the old model says, which is true, and below it what the new one says.
    """
    columns, rows = max(1, min(_COLUMNS, len(images))), max(1, math.ceil(len(images) / _COLUMNS))
    figure = Figure(figsize=(max(1.5 * columns, 6), 1.9 * rows + 0.5), layout="constrained")
    figure.suptitle(f"{title}\nabove: the old model, right; below: the new one", fontsize="medium", parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    for axes in panels[len(images) :]:
        axes.set_axis_off()
    if not len(flips):
        panels[0].text(0.5, 0.5, "none", ha="center", va="center")
    for axes, image, (_, flip) in zip(panels, images, flips.iterrows(), strict=False):
        axes.imshow(image)
        axes.set(xticks=[], yticks=[])
        axes.set_title(_said(flip, "old"), fontsize=7, color="C2", parse_math=False)
        axes.set_xlabel(_said(flip, "new"), fontsize=7, color="C3", parse_math=False)
    return figure


def draw_flip_matrix(flips: pd.DataFrame, title: str) -> Figure:
    """Count which class the new model puts in the place of which.

    Args:
        flips: As of `tabulate_flips`.
        title: What this is.

    Returns:
        A figure: the right answers of the old model by the wrong ones of the new. Of many classes, the 30 with most
        flips.
    """
    counts = pd.concat([flips["class"], flips["new_prediction"]]).value_counts()
    names = sorted(counts.index[:_CLASSES])
    table = pd.crosstab(flips["class"], flips["new_prediction"]).reindex(index=names, columns=names, fill_value=0)
    side = min(3.5 + 0.28 * len(names), 12)
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    kept = f"\n{_CLASSES} of {len(counts)} classes, {table.to_numpy().sum()} flips" if len(counts) > _CLASSES else ""
    figure.suptitle(title + kept, fontsize="medium", parse_math=False)
    axes.set(xlabel="new model", ylabel="old model, which is right")
    if not names:
        axes.set(xticks=[], yticks=[])
        axes.text(0.5, 0.5, "none", ha="center", va="center")
        return figure
    image = axes.imshow(table.to_numpy(), cmap="Reds", vmin=0)
    figure.colorbar(image, shrink=0.7, label="samples", ticks=MaxNLocator(integer=True))
    labels = [shorten(name) for name in names]
    axes.set_xticks(range(len(names)), labels, rotation=90, parse_math=False)
    axes.set_yticks(range(len(names)), labels, parse_math=False)
    largest = table.to_numpy().max()
    for row, column in zip(*table.to_numpy().nonzero(), strict=True):
        number = table.iloc[row, column]
        color = "white" if number > largest / 2 else "black"
        axes.text(column, row, str(number), ha="center", va="center", color=color, fontsize=8)
    return figure


def _said(flip: pd.Series, who: str) -> str:
    name, confidence = shorten(flip[f"{who}_prediction"]), flip[f"{who}_confidence"]
    return name if math.isnan(confidence) else f"{name} {confidence:.2f}"


def shorten(name: str) -> str:
    """Make a name fit over a picture.

    Args:
        name: Of a class.

    Returns:
        The name, its middle left out if it is long: names often differ in their ends only.
    """
    half = _LETTERS // 2 - 1
    return name if len(name) <= _LETTERS else f"{name[:half]}..{name[-half:]}"
