"""Pictures of a comparison, as text that a page can hold."""

import base64
import io
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.dataset import ImageDataset
from lqf_lightning.teachers import View

_SIDE = 160  # pixels of a thumbnail, twice what the page shows
_COLORS = {"new": "#1f4e9c", "old": "#6b7280", "chosen": "#b42318"}
_COLORS |= {"bcwi": "#1f4e9c", "fisher": "#b7791f", "soup": "#1f4e9c"}


def draw_averages(averages: Mapping[str, Any]) -> str:
    """Draw negative flips against error on validation images, and each against the share of the old model.

    Args:
        averages: The averages' part of the report.

    Returns:
        An address that holds the picture.
    """
    figure = Figure(figsize=(10, 4.4), layout="constrained")
    panels = figure.subplot_mosaic([["both", "error"], ["both", "nfr"]], width_ratios=[1.3, 1])
    validation, chosen = averages["validation"], averages["chosen"]
    for kind in averages["kinds"]:
        _draw_kind(panels, kind, [point for point in validation["points"] if point["kind"] == kind])
    _draw_models(panels["both"], validation)
    limit = _percent(validation["new"]["error"] + averages["max_error_increase"])
    line: dict[str, Any] = {"color": "#9ca3af", "linestyle": ":", "linewidth": 1}
    panels["both"].axvline(limit, label="largest error allowed", **line)
    panels["error"].axhline(limit, **line)
    if chosen:
        options: dict[str, Any] = {
            "facecolors": "none",
            "edgecolors": _COLORS["chosen"],
            "s": 130,
            "linewidths": 1.8,
            "zorder": 5,
        }
        panels["both"].scatter([_percent(chosen["error"])], [_percent(chosen["nfr"])], label="chosen", **options)
        for name in ("error", "nfr"):
            panels[name].axvline(chosen["share"], color=_COLORS["chosen"], linewidth=1)
    panels["both"].set(xlabel="error, %", ylabel="negative flip rate, %")
    panels["error"].set(ylabel="error, %")
    panels["nfr"].set(ylabel="NFR, %", xlabel="share of the old model")
    for axes in panels.values():
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
    panels["both"].legend(fontsize=8, frameon=False)
    stream = io.BytesIO()
    figure.savefig(stream, dpi=160, format="png")
    return _address(stream.getvalue(), "png")


def _draw_kind(panels: Mapping[str, Axes], kind: str, points: Sequence[Mapping[str, Any]]) -> None:
    shares = [point["share"] for point in points]
    error, nfr = ([_percent(point[name]) for point in points] for name in ("error", "nfr"))
    style: dict[str, Any] = {"color": _COLORS[kind], "markersize": 4, "linewidth": 1.2, "marker": "o"}
    panels["both"].plot(error, nfr, label=kind, **style)
    for point, x, y in zip(points, error, nfr, strict=True):
        text: dict[str, Any] = {"textcoords": "offset points", "fontsize": 7, "color": "#4b5563"}
        panels["both"].annotate(f"{point['share']:g}", (x, y), (4, 4), **text)
    panels["error"].plot(shares, error, **style)
    panels["nfr"].plot(shares, nfr, **style)


def _draw_models(axes: Axes, validation: Mapping[str, Any]) -> None:
    new, alone = validation["new"], validation["new_reestimated"]
    axes.plot(_percent(new["error"]), _percent(new["nfr"]), "D", color=_COLORS["new"], label="new model")
    if alone:
        hollow: dict[str, Any] = {"markerfacecolor": "none", "label": "new model, statistics anew"}
        axes.plot(_percent(alone["error"]), _percent(alone["nfr"]), "D", color=_COLORS["new"], **hollow)
    axes.plot(_percent(validation["old_error"]), 0, "D", color=_COLORS["old"], label="old model")


def thumbnails(data: ImageDataModule, split: str, index: Sequence[int]) -> dict[int, str]:
    """Read images and make them small.

    Args:
        data: The data module, set up.
        split: Name of the split that they belong to.
        index: Rows of the manifest.

    Returns:
        For each an address that holds the picture.
    """
    if not index:
        return {}
    view = View(data.image_size, data.crop_fraction, (0.0, 0.0, 0.0), (1.0, 1.0, 1.0))
    dataset: ImageDataset = data.view_dataloader(split, view).dataset  # type: ignore[assignment]  # what it is made of
    records = {record.index: record for record in dataset.records}
    return {i: _small(records[i].images.read(records[i].position)) for i in index}


def _small(image: Image.Image) -> str:
    if max(image.size) > _SIDE:
        image.thumbnail((_SIDE, _SIDE))
    stream = io.BytesIO()
    image.save(stream, "JPEG", quality=88)
    return _address(stream.getvalue(), "jpeg")


def _address(content: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(content).decode()}"


def _percent(value: float) -> float:
    return 100 * value
