"""Pictures of a deletion report, as text that a page can hold."""

import base64
import io
import math
from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lqf_lightning.deletion.report_words import ATTACKS

Report = Mapping[str, Any]
MODELS = ("original", "scrubbed", "retrained")
_COLORS = {"original": "#9ca3af", "scrubbed": "#1f4e9c", "retrained": "#18794e"}
_PARTS = {"retain": "retained", "forget": "forgotten", "test": "test"}
_TITLES = {"entropy_attack": "called members\nby entropy, %", "likelihood_ratio_auc": "likelihood ratio attack,\nAUC"}


def draw_errors(models: Mapping[str, Report]) -> str | None:
    """Draw the errors of every model on retained, forgotten and test samples.

    Args:
        models: Read-outs by model.

    Returns:
        An address that holds the picture; None if nothing was measured.
    """
    values = {name: [_percent(model.get(f"{part}_error")) for part in _PARTS] for name, model in _ordered(models)}
    return _bars(values, "error, %")


def draw_distances(models: Mapping[str, Report]) -> str | None:
    """Draw how far the answers of every model are from those of the retrained one.

    Args:
        models: Read-outs by model.

    Returns:
        An address that holds the picture; None if nothing was measured.
    """
    values = {}
    for name, model in _ordered(models):
        distances = model.get("activation_distance")
        if distances and name != "retrained":
            values[name] = [_number(distances.get(part)) for part in _PARTS]
    return _bars(values, "distance of answers\nfrom the retrained model")


def draw_attacks(models: Mapping[str, Report]) -> str | None:
    """Draw attack scores with their errors; a band marks the score of the retrained model, which is the aim.

    Args:
        models: Read-outs by model.

    Returns:
        An address that holds the picture; None if no attack was made.
    """
    made = [name for name in ATTACKS if any(model.get(name) is not None for model in models.values())]
    if not made:
        return None
    figure = Figure(figsize=(3.4 * len(made) + 1, 3.2), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(made), squeeze=False)[0], made, strict=True):
        _draw_attack(axes, models, name)
    return _address(figure)


def _draw_attack(axes: Axes, models: Mapping[str, Report], name: str) -> None:
    unit = 100 if name == "entropy_attack" else 1
    for position, (role, model) in enumerate(_ordered(models)):
        score, error = unit * _number(model.get(name)), unit * _number(model.get(ATTACKS[name]))
        color = _COLORS.get(role, "#b7791f")
        bar = None if math.isnan(error) else error
        axes.errorbar([position], [score], yerr=bar, fmt="o", color=color, capsize=5, markersize=8)
        axes.annotate(f"{score:.3g}", (position, score), (9, -3), textcoords="offset points", fontsize=9)
        if role == "retrained" and not math.isnan(score):
            axes.axhline(score, color=color, linestyle="--", linewidth=1)
            if bar is not None:
                axes.axhspan(score - bar, score + bar, color=color, alpha=0.12, linewidth=0)
    if name == "likelihood_ratio_auc":
        axes.axhline(0.5, color="#9ca3af", linestyle=":", linewidth=1)
    names = [role for role, _ in _ordered(models)]
    axes.set_xticks(range(len(names)), names)
    axes.set(ylabel=_TITLES[name], xlim=(-0.5, len(names) - 0.3))
    _plain(axes)


def draw_curve(curve: Sequence[Report]) -> str | None:
    """Draw how the certificate, or the loss, fell over the passes.

    Args:
        curve: Entries with ``passes`` and ``distance_bound`` and ``relative_gradient``, or ``loss``.

    Returns:
        An address that holds the picture; None if there is no curve.
    """
    titles = {"distance_bound": "distance from the optimum,\nat most", "relative_gradient": "gradient left,\nrelative",
              "loss": "loss"}  # fmt: skip
    shown = [name for name in titles if any(math.isfinite(_number(point.get(name))) for point in curve)]
    if not shown:
        return None
    figure = Figure(figsize=(3.9 * len(shown) + 0.5, 2.9), layout="constrained")
    for axes, name in zip(figure.subplots(1, len(shown), squeeze=False)[0], shown, strict=True):
        points = [(point["passes"], point[name]) for point in curve if math.isfinite(_number(point.get(name)))]
        axes.plot(*zip(*points, strict=True), "o-", color=_COLORS["scrubbed"], markersize=4, linewidth=1.4)
        if name != "loss" and all(value > 0 for _, value in points):
            axes.set_yscale("log")
        axes.set(xlabel="passes over the retained samples", ylabel=titles[name])
        _plain(axes)
    return _address(figure)


def draw_queries(queries: Sequence[Report], nats: float | None) -> str | None:
    """Draw what answers tell over their number, below what the weights tell.

    Args:
        queries: Entries with ``number`` and ``nats``.
        nats: What the weights tell of the same two models; None if that is not known.

    Returns:
        An address that holds the picture; None without queries.
    """
    points = [(entry["number"], entry["nats"]) for entry in queries if math.isfinite(_number(entry.get("nats")))]
    if not points:
        return None
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    axes.plot(*zip(*points, strict=True), "o-", color=_COLORS["scrubbed"], markersize=4, label="answers to queries")
    if nats is not None and math.isfinite(nats):
        axes.axhline(nats, color="#b42318", linestyle="--", linewidth=1.2, label="all weights")
    axes.set_xscale("log")
    if all(value > 0 for _, value in points):
        axes.set_yscale("log")
    axes.set(xlabel="queries", ylabel="information, nats")
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    return _address(figure)


def _bars(values: Mapping[str, Sequence[float]], title: str) -> str | None:
    if not any(not math.isnan(value) for entries in values.values() for value in entries):
        return None
    figure = Figure(figsize=(6, 3), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(values)
    for place, (name, heights) in enumerate(values.items()):
        positions = [part - 0.4 + (place + 0.5) * width for part in range(len(heights))]
        bars = axes.bar(positions, heights, 0.9 * width, color=_COLORS.get(name, "#b7791f"), label=name)
        axes.bar_label(bars, ["" if math.isnan(height) else f"{height:.3g}" for height in heights], fontsize=8)
    axes.set_xticks(range(len(_PARTS)), [f"{title} samples" for title in _PARTS.values()])
    axes.set_ylabel(title)
    axes.margins(y=0.12)
    axes.legend(fontsize=8, frameon=False)
    _plain(axes)
    return _address(figure)


def _ordered(models: Mapping[str, Report]) -> list[tuple[str, Report]]:
    known = [name for name in MODELS if name in models]
    return [(name, models[name]) for name in [*known, *(name for name in models if name not in MODELS)]]


def _plain(axes: Axes) -> None:
    axes.grid(alpha=0.25, axis="y")
    axes.spines[["top", "right"]].set_visible(False)


def _address(figure: Figure) -> str:
    stream = io.BytesIO()
    figure.savefig(stream, dpi=150, format="png")
    return f"data:image/png;base64,{base64.b64encode(stream.getvalue()).decode()}"


def _number(value: float | None) -> float:
    # What is infinite has no place on an axis; the table says it in words.
    return value if value is not None and math.isfinite(value) else math.nan


def _percent(value: float | None) -> float:
    return 100 * _number(value)
