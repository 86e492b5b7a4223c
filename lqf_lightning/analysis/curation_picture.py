"""Pictures of a curated training set."""

from collections.abc import Sequence

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lqf_lightning.analysis.curation import Curation

_COLUMNS = 8
_SAID = {
    "summarize": ("unique information when a sample left, nats", "share of the training samples", "accuracy"),
    "reweight": ("sample weight", "step", "held-out loss"),
    "extend": ("derivative of the held-out loss in the weight", "training samples", "held-out loss"),
    "detrimental": ("derivative of the held-out loss in the weight", "", ""),
}


def ends_of(found: Curation, count: int = _COLUMNS) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The samples to look at.

    Args:
        found: What a task has found.
        count: How many at each end.

    Returns:
        Rows of the lowest values and of the highest, each from the extreme inwards.
    """
    ranked = found.samples.sort_values("value", kind="stable")
    return ranked.head(count), ranked.tail(count)[::-1]


def draw_curation(found: Curation, lowest: Sequence[Image.Image], highest: Sequence[Image.Image]) -> Figure:
    """Draw the values of all samples, how accuracy or loss went, and the samples at both ends.

    Args:
        found: What a task has found.
        lowest: Pictures of the samples of `ends_of` with the lowest values.
        highest: The same of the highest.

    Returns:
        A figure.
    """
    value, across, up = _SAID[found.report["task"]]
    figure = Figure(figsize=(10, 7.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=[1.2, 1.0], squeeze=False)[:, 0]
    plots = top.subplots(1, 2 if found.curves else 1, squeeze=False)[0]
    plots[0].hist(found.samples["value"], bins=30)
    plots[0].set(xlabel=value, ylabel="training samples")
    for name, (x, y) in found.curves.items():
        plots[1].plot(x, y, marker="." if len(x) < 40 else None, label=name)
        plots[1].set(xlabel=across, ylabel=up)
    if len(found.curves) > 1:
        plots[1].legend()
    kind = "exact" if found.report["exact"] else f"{found.report['kernel']} kernel, a surrogate"
    kind = f"linear model of the run, {kind}" if found.report["twin"] else kind
    figure.suptitle(f"{found.report['task']} ({kind})", fontsize="medium", parse_math=False)
    panels = bottom.subplots(2, max(_COLUMNS, len(lowest)), squeeze=False, gridspec_kw={"hspace": 0.2})
    for row, name, table, images in zip(panels, ("lowest", "highest"), ends_of(found), (lowest, highest), strict=True):
        _fill(row, name, table, images)
    return figure


def _fill(row: Sequence[Axes], name: str, table: pd.DataFrame, images: Sequence[Image.Image]) -> None:
    for axes in row:
        axes.set(xticks=[], yticks=[])
        axes.set_frame_on(False)
    row[0].set_ylabel(name, fontsize=8)
    for axes, image, (_, sample) in zip(row, images, table.iterrows(), strict=False):
        axes.imshow(image, cmap="gray" if image.mode == "L" else None)
        axes.set_title(str(sample["class"])[:14], fontsize=7, parse_math=False)
        axes.set_xlabel(f"{sample['value']:.3g}", fontsize=7)
