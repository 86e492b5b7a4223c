"""Sections of a deletion report's page."""

from collections.abc import Mapping
from html import escape
from typing import Any

from lqf_lightning.deletion.report_parts import bullets, fact_list, paragraphs, picture
from lqf_lightning.deletion.report_pictures import draw_curve, draw_queries
from lqf_lightning.deletion.report_words import SCRUBS, bound_in_words, noise_in_words, percent, quantity

Report = Mapping[str, Any]


def request_section(report: Report) -> str:
    """What was requested, and of which model.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    request, model = report["request"], report["model"]
    classes = ", ".join(f"{name}: {count:,}" for name, count in request.get("classes", {}).items())
    linear = "linear in its trained weights" if model["linear"] else "not linear in its trained weights"
    facts = {
        "samples to forget": f"{request['number']:,} ({request['cohort']})",
        "their classes": classes or "not recorded",
        "training samples": f"{request['train_before']:,} before, {request['train_after']:,} after",
        "request": f"number {request['position']} on this model, {request['date']}",
        "their image files": f"{request.get('files_gone') or 0:,} of {request['number']:,} are gone",
        "model": f"{request['run']}: {model['method']} of {model['backbone']}, {quantity(model['parameters'])} trained "
        f"parameters, {model['outputs']} outputs, {linear}",
    }
    return f"<section><h2>What was requested</h2>{fact_list(facts)}</section>"


def scrub_section(report: Report) -> str:
    """What was done to the weights.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    scrub = report["scrub"]
    cheaper = ""
    if scrub.get("recipe_passes") and scrub["passes"]:
        ratio = scrub["recipe_passes"] / scrub["passes"]
        cheaper = f"; {quantity(scrub['recipe_passes'])} epochs of a usual recipe are {quantity(ratio)} times as many"
    facts = {
        "work": f"{scrub['steps']:,} steps, {quantity(scrub['passes'])} passes over the retained samples, "
        f"{quantity(scrub['seconds'])} seconds{cheaper}",
        "change of the weights": f"{quantity(scrub.get('weight_change'))}, their norm is "
        f"{quantity(scrub.get('weight_norm'))}",
        "gradient on the retained samples": f"{quantity(scrub.get('relative_gradient_before'))} before, "
        f"{quantity(scrub.get('relative_gradient'))} after by the solver's account, "
        f"{quantity(scrub.get('verified_relative_gradient'))} measured anew; tolerance "
        f"{quantity(scrub.get('tolerance'))} (1 is the untrained model)",
        "distance from the optimum": f"at most {quantity(scrub['distance_bound'])}"
        if scrub.get("distance_bound") is not None
        else "no bound: nothing is certified",
        "noise": noise_in_words(scrub.get("noise")),
    }
    drawn = picture(draw_curve(scrub.get("curve") or []), "What was left over the passes of the scrub")
    words = escape(SCRUBS.get(scrub["name"], scrub["name"]))
    return f"<section><h2>What was done</h2><p>{words}</p>{fact_list(facts)}{drawn}</section>"


def bound_section(report: Report) -> str:
    """How much information is left at most, in plain words, and what that assumes.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    bound, noise = report["bound"], report["scrub"].get("noise")
    nats, intercept = bound.get("nats"), bound.get("intercept_nats")
    total = None if nats is None else nats + (intercept or 0.0)
    words = [bound_in_words(total, noise)]
    if intercept:
        words.append(f"Of these, {quantity(intercept)} nats are those of the intercept.")
    queries = bound.get("queries") or []
    drawn = ""
    if queries and noise is not None:
        last = queries[-1]
        measured = bound.get("measured_nats")
        words.append(
            "Whoever sees answers learns no more than the weights tell. Measured against the retrained model at hand, "
            "which is near the optimum but not at it, so that both may be above the bound: the weights tell "
            f"{quantity(measured)} nats, answers to {quantity(last['number'])} queries tell "
            f"{quantity(last['nats'])} nats."
        )
        drawn = picture(
            draw_queries(queries, total if measured is None else measured),
            "What answers tell, over the number of queries",
        )
    else:
        words.append("What answers to queries tell was not computed.")
    assumes = bound.get("assumes") or []
    listed = f"<p>This assumes:</p>{bullets(assumes)}" if assumes else ""
    return f"<section><h2>How much is left at most</h2>{paragraphs(words)}{drawn}{listed}</section>"


def limits_section(report: Report) -> str:
    """What the request does not cover.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    points = report.get("not_covered") or []
    listed = bullets(points) if points else "<p>Nothing was recorded here, which does not mean that all is covered.</p>"
    return f'<section class="warning"><h2>What this does not cover</h2>{listed}</section>'


def removal_section(report: Report) -> str:
    """What was deleted from the run folder.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    removed = report.get("removed")
    if removed is None:
        return (
            "<section><h2>What was deleted</h2><p>Nothing: caches, tables and checkpoints in the run folder are as "
            "they were and may hold the samples.</p></section>"
        )
    titles = {
        "deleted": "deleted", "filtered": "kept without the samples", "not_inspected": "not inspected",
        "remains": "still holding the samples",
    }  # fmt: skip
    facts = {title: ", ".join(map(str, removed.get(name) or [])) or "none" for name, title in titles.items()}
    return f"<section><h2>What was deleted</h2>{fact_list(facts)}</section>"


def hashes_section(report: Report) -> str:
    """Fingerprints that tie this page to weights, samples and configuration.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    hashes = report.get("hashes") or {}
    if not hashes:
        return "<section><h2>Fingerprints</h2><p>None were taken.</p></section>"
    return f"<section><h2>Fingerprints</h2>{fact_list(hashes)}</section>"


def tiles(report: Report) -> str:
    """The numbers that matter most.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    request, scrub, bound = report["request"], report["scrub"], report["bound"]
    nats = bound.get("nats")
    left = "infinite" if scrub.get("noise") is None else "no bound"
    if nats is not None and (nats == 0 or scrub.get("noise") is not None):
        left = f"{quantity(nats + (bound.get('intercept_nats') or 0.0))} nats"
    models = (report.get("read_outs") or {}).get("models") or {}
    shown = [
        ("samples forgotten", f"{request['number']:,}", f"of {request['train_before']:,}"),
        ("information left, at most", left, "in the weights"),
        ("work", f"{quantity(scrub['passes'])} passes", f"{quantity(scrub['seconds'])} seconds"),
    ]
    if "scrubbed" in models:
        before = percent(models["original"].get("test_error")) if "original" in models else "not measured"
        shown.append(("test error", percent(models["scrubbed"].get("test_error")), f"before: {before}"))
    drawn = (f'<div class="tile"><span>{a}</span><b>{escape(b)}</b><span>{escape(c)}</span></div>' for a, b, c in shown)
    return f'<div class="tiles">{"".join(drawn)}</div>'
