"""The part of a deletion report that compares models: a table and pictures."""

from collections.abc import Mapping
from html import escape
from typing import Any

from lqf_lightning.deletion.report_parts import paragraphs, picture
from lqf_lightning.deletion.report_pictures import draw_attacks, draw_distances, draw_errors
from lqf_lightning.deletion.report_words import ATTACKS, QUANTITIES, quantity, read_out

Report = Mapping[str, Any]


def behavior_section(report: Report) -> str:
    """Whether the model behaves like a retrained one: a table and pictures.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    title = "<h2>Does it behave like a model that never saw them?</h2>"
    read_outs = report.get("read_outs") or {}
    models = read_outs.get("models") or {}
    if not models:
        return f"<section>{title}<p>The behavior of the models was not measured.</p></section>"
    words = []
    if not read_outs.get("against"):
        words.append(
            "There is no retrained model to compare with, so the numbers below have no aim. Run again with "
            "retrained=, the checkpoint of a model that was trained without the samples."
        )
    if attack := read_outs.get("likelihood_ratio"):
        why, shadows = attack.get("why"), attack.get("shadows")
        words.append(
            f"No likelihood ratio attack: {why}."
            if why
            else f"The likelihood ratio attack used {shadows} shadow models."
        )
    if relearn := read_outs.get("relearn"):
        listed = ", ".join(f"{name.replace('_', ' ')} {quantity(value)}" for name, value in relearn.items())
        words.append(f"Relearning: {listed}.")
    if read_outs.get("norm") and any(model.get("activation_distance") for model in models.values()):
        words.append(f"Distances of answers are {read_outs['norm']}.")
    pictures = (
        picture(draw_errors(models), "Errors of the models")
        + picture(draw_attacks(models), "Attack scores with standard errors; dashed the retrained model's, the aim")
        + picture(draw_distances(models), "How far answers are from those of the retrained model")
    )
    return f"<section>{title}{paragraphs(words)}{_table(models)}{pictures}</section>"


def _table(models: Mapping[str, Report]) -> str:
    names = list(models)
    rows = []
    for name, (title, meaning) in QUANTITIES.items():
        if all(model.get(name) is None for model in models.values()):
            continue
        cells = "".join(f"<td>{_cell(name, models[role])}</td>" for role in names)
        rows.append(f"<tr><td>{escape(title)}<small>{escape(meaning)}</small></td>{cells}</tr>")
    heads = "".join(f"<th>{escape(role)}</th>" for role in ["", *names])
    return f'<table class="compared"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'


def _cell(name: str, model: Report) -> str:
    value = model.get(name)
    if name == "activation_distance" and value:
        parts = {"retain": "retained", "forget": "forgotten", "test": "test"}
        return "<br>".join(f"{title} {quantity(value.get(part))}" for part, title in parts.items())
    error = model.get(ATTACKS.get(name, ""))
    between = f"<small>± {escape(read_out(name, error))}</small>" if error is not None else ""
    return f"{escape(read_out(name, value))}{between}"
