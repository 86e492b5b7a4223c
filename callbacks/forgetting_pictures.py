"""A picture of what a model holds about cohorts, and of what forgetting them takes."""

from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

_MARGIN = 1e-12  # of the largest value, below which a logarithmic axis does not go


def draw_forgetting(table: pd.DataFrame, prices: Mapping[str, Mapping[str, Any]], sigma: float) -> Figure:
    """Information in weights and in answers over training steps, and the gradient over the passes of each scrub.

    Args:
        table: Columns `step`, `cohort`, `weights_nats`, `least_nats`, `outputs_nats` and `cohort_outputs_nats`.
        prices: By cohort `number`, `optimum_nats`, `accuracy_cost`, `scrub_tolerance` and `scrub_curve`.
        sigma: Deviation of the noise.

    Returns:
        A figure of three panels.
    """
    figure = Figure(figsize=(14, 4.4), layout="constrained")
    weights, answers, scrubs = figure.subplots(1, 3)
    colors = {name: f"C{number}" for number, name in enumerate(prices)}
    for name, part in table.groupby("cohort", sort=False):
        color, known = colors.get(str(name), "gray"), str(name) in prices
        label = f"{name} ({prices[str(name)]['number']})" if known else "unfinished training"
        _curve(weights, part, "weights_nats", "-" if known else "--", color, label)
        if not known:
            continue
        _curve(weights, part, "least_nats", ":", color)
        weights.axhline(prices[str(name)]["optimum_nats"], color=color, linewidth=0.8, alpha=0.5)
        _curve(answers, part, "outputs_nats", "-", color, f"{name}, validation images")
        _curve(answers, part, "cohort_outputs_nats", "--", color, f"{name}, its own images")
    weights.set(title="in the weights (dotted: least; line: when finished)", xlabel="step", ylabel="nats")
    answers.set(title="in the answers to queries", xlabel="step", ylabel="nats")
    _draw_scrubs(scrubs, prices, colors)
    for axes in (weights, answers, scrubs):
        axes.grid(alpha=0.3)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        if any(len(line.get_ydata()) and max(line.get_ydata()) > 0 for line in axes.get_lines()):
            axes.set_yscale("log")
        if axes.get_legend_handles_labels()[0]:
            legend = axes.legend(fontsize="small")
            for text in legend.get_texts():
                text.set_parse_math(False)
    figure.suptitle(f"what the model holds about each cohort, noise sigma = {sigma:g}", fontsize="medium")
    return figure


def _curve(axes: Axes, part: pd.DataFrame, column: str, style: str, color: str, label: str | None = None) -> None:
    shown = part[part[column] > _MARGIN * max(float(part[column].max()), 1e-300)]  # missing values are not
    if len(shown):
        axes.plot(shown["step"], shown[column], style, marker="o", markersize=3, color=color, label=label)


def _draw_scrubs(axes: Axes, prices: Mapping[str, Mapping[str, Any]], colors: Mapping[str, str]) -> None:
    for name, row in prices.items():
        cost = row["accuracy_cost"]
        label = name if cost is None else f"{name}: accuracy {0.0 - cost:+.2%}"
        shown = [value for value in row["scrub_curve"] if value > 0]
        axes.plot(range(len(shown)), shown, marker="o", markersize=3, color=colors[name], label=label)
        axes.axhline(row["scrub_tolerance"], color="black", linewidth=0.8, linestyle="--")
    axes.set(title="scrub from the optimum, as foretold", xlabel="step of conjugate gradients")
    axes.set_ylabel("relative gradient on the rest")
