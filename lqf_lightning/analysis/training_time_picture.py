"""The predicted course of training under the measured one, thresholds marked."""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from lqf_lightning.linear.training_time import smoothed


def draw_training_time(
    predicted: Tensor, rows: Sequence[Mapping[str, Any]], window: int, measured: Tensor | None = None, note: str = ""
) -> Figure:
    """Loss over steps, predicted and measured, averaged over an epoch.

    Args:
        predicted: Predicted loss of the batch of every step (T,).
        rows: Thresholds, as of `threshold_rows` or `compare_with`.
        window: Steps that are averaged.
        measured: Measured loss of the batch of every step so far; None: nothing is trained.
        note: What the prediction is of.

    Returns:
        A figure with a logarithmic loss.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    axes = figure.subplots()
    for values, label, style in ((predicted, "predicted", "-"), (measured, "measured", "--")):
        if values is not None and len(values):
            axes.plot(torch.arange(len(values)).numpy(), smoothed(values.cpu(), window).numpy(), style, label=label)
    for row in rows:
        axes.axhline(row["loss"], color="gray", linewidth=0.6)
        for key, marker, color in (("predicted_steps", "o", "C0"), ("measured_steps", "s", "C1")):
            if row.get(key) is not None:
                axes.plot([row[key]], [row["loss"]], marker, color=color, markersize=5)
        axes.annotate(f"{row['fraction']:g}", (1, row["loss"]), xycoords=("axes fraction", "data"), fontsize=7)
    axes.set(xlabel="step", ylabel="training loss", title=note or "training time", yscale="log")
    axes.grid(alpha=0.3)
    if axes.get_legend_handles_labels()[0]:
        axes.legend()
    return figure
