"""Pictures of what samples tell: the most and the least, suspected label errors, and classes."""

import math
from collections.abc import Iterable, Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from .flip_pictures import shorten

_COLUMNS = 8
_CLASSES = 30


def draw_ends(
    most: pd.DataFrame,
    most_images: Sequence[Image.Image],
    least: pd.DataFrame,
    least_images: Sequence[Image.Image],
    *,
    by: str,
    settings: str,
) -> Figure:
    """The samples that tell most, above those that tell least.

    Args:
        most: Rows of the table of scores, the most informative first.
        most_images: Their pictures.
        least: Rows, the least informative first.
        least_images: Their pictures.
        by: The score.
        settings: What it depends on, in words.

    Returns:
        A figure; over every sample its label, below it the score, and the class that the others give it if another.
    """
    columns = max(1, min(_COLUMNS, len(most_images)))
    rows = math.ceil(len(most_images) / columns)
    figure = Figure(figsize=(max(1.5 * columns, 6), 4.0 * rows + 0.9), layout="constrained")
    figure.suptitle(f"{by.replace('_', ' ')} in nats ({settings})", fontsize="medium", parse_math=False)
    ends = (("most", most, most_images), ("least", least, least_images))
    for part, (name, table, images) in zip(figure.subfigures(2, 1, squeeze=False).flatten(), ends, strict=True):
        part.suptitle(f"{name} informative", fontsize="small")
        _fill(part.subplots(rows, columns, squeeze=False).flatten(), table, images, by)
    return figure


def draw_suspects(suspects: pd.DataFrame, images: Sequence[Image.Image], *, settings: str) -> Figure:
    """Samples whose label all others contradict, the strongest contradiction first.

    Args:
        suspects: Rows of the table of scores.
        images: Their pictures.
        settings: What the scores depend on, in words.

    Returns:
        A figure; over every sample its label, below it what the others say.
    """
    columns, rows = max(1, min(_COLUMNS, len(images))), max(1, math.ceil(len(images) / _COLUMNS))
    figure = Figure(figsize=(max(1.5 * columns, 6), 1.9 * rows + 0.6), layout="constrained")
    title = "labels that the other samples contradict: above the label, below what the others say"
    figure.suptitle(f"{title}\n({settings})", fontsize="medium", parse_math=False)
    panels = figure.subplots(rows, columns, squeeze=False).flatten()
    if not len(suspects):
        panels[0].text(0.5, 0.5, "none", ha="center", va="center")
    _fill(panels, suspects, images, None)
    return figure


def draw_by_class(table: pd.DataFrame, *, by: str, settings: str) -> Figure:
    """How information is distributed within each class.

    Args:
        table: The table of scores.
        by: The score.
        settings: What it depends on, in words.

    Returns:
        A figure of a box per class, the class of the highest median on top; of many classes the 30 highest.
    """
    medians = table.groupby("class")[by].median().sort_values(ascending=False)
    names = medians.index[:_CLASSES].tolist()[::-1]
    figure = Figure(figsize=(7, 1.4 + 0.28 * len(names)), layout="constrained")
    axes = figure.subplots()
    axes.boxplot(
        [table.loc[table["class"] == name, by] for name in names], orientation="horizontal", widths=0.6,
        flierprops={"markersize": 3}, medianprops={"color": "C3"},
    )  # fmt: skip
    axes.set_yticks(range(1, len(names) + 1), [shorten(name) for name in names], parse_math=False)
    positive = table.loc[table[by] > 0, by]
    if len(positive) and positive.max() > 100 * positive.min():
        axes.set_xscale("log")
    axes.set(xlabel=f"{by.replace('_', ' ')} (nats)")
    axes.grid(axis="x", alpha=0.3)
    more = f"; the {_CLASSES} highest of {len(medians)} classes" if len(medians) > _CLASSES else ""
    figure.suptitle(f"what samples tell, by class ({settings}{more})", fontsize="small", parse_math=False)
    return figure


def _fill(panels: Iterable[Axes], rows: pd.DataFrame, images: Sequence[Image.Image], by: str | None) -> None:
    panels = list(panels)
    for axes in panels:
        axes.set(xticks=[], yticks=[])
    for axes in panels[max(1, len(images)) :]:
        axes.set_axis_off()
    for axes, image, (_, row) in zip(panels, images, rows.iterrows(), strict=False):
        axes.imshow(image, cmap="gray" if image.mode == "L" else None)
        wrong = row["proposed"] != row["class"]
        axes.set_title(shorten(row["class"]), fontsize=7, color="C3" if wrong else "black", parse_math=False)
        said = shorten(row["proposed"]) if wrong else ""
        score = "" if by is None else f"{row[by]:.3g}"
        axes.set_xlabel("\n".join(part for part in (score, said) if part), fontsize=7, parse_math=False)
