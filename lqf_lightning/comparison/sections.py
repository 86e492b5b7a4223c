"""Sections of a comparison's page: averages, replaced classes, flipped images, classes, provenance."""

from collections import Counter
from collections.abc import Mapping, Sequence
from html import escape
from typing import Any

from lqf_lightning.comparison.pictures import draw_averages
from lqf_lightning.comparison.words import interval, number

Report = Mapping[str, Any]
_KINDS = {
    "bcwi": "bcwi interpolates every weight between old and new (backward compatible weight interpolation).",
    "fisher": "fisher does so the more towards the old value, the more the old model's answers depend on the weight.",
    "soup": "soup interpolates every weight between the old model and the mean of the new ones.",
}
_MATRIX = 20  # classes that fit into a matrix
_CLASSES = 200  # rows of the table of classes


def averages_section(report: Report) -> str:
    """The trade-off of the averages, and how the choice was made.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    averages = report["averages"]
    title = "<h2>Averages of old and new weights</h2>"
    if not averages["kinds"]:
        return f"<section>{title}<p>None: {escape(averages['reason'])}.</p></section>"
    statistics = {
        "reestimate": "Between the ends, running statistics of batch normalization are estimated anew from training "
        "images.",
        "average": "Running statistics of batch normalization, where there are any, are averaged like weights.",
    }
    images, slack = averages["validation"]["number"], averages["max_error_increase"]
    limit = f"the new model's plus {100 * slack:g} points" if slack else "that of the new model"
    rule = (
        f"Chosen is the average with the fewest negative flips among those whose error on {images:,} validation images "
        f"is at most {limit}. "
        f"{' '.join(_KINDS[kind] for kind in averages['kinds'])} {statistics[averages['batch_norm']]}"
    )
    if alone := averages["validation"]["new_reestimated"]:
        rule += (
            f" That alone, without averaging, gives the new model an error of {number('error', alone['error'])} and a "
            f"negative flip rate of {number('nfr', alone['nfr'])} on the validation images."
        )
    if report["split"] == "val":
        rule += " Its rates are reported on the images it was chosen by, so they flatter it: set split=test."
    picture = draw_averages(averages)
    found = _chosen(averages)
    return (
        f'<section>{title}<p>{escape(rule)}</p><figure class="curve"><img alt="Negative flip rate against error of '
        f'averages on validation images" src="{picture}"><figcaption>Validation images. Numbers beside the points are '
        f"shares of the old model: 0 is the new model, 1 the old one.</figcaption></figure>{found}</section>"
    )


def _chosen(averages: Report) -> str:
    if not averages["chosen"]:
        return "<p>No average was chosen.</p>"
    path = escape(averages["checkpoint"])
    return (
        f"<p>The chosen average is a checkpoint like any other, for <code>lqf-eval checkpoint=...</code> and "
        f"<code>reference=...</code>: <code>{path}</code></p>"
    )


def matrix_section(report: Report) -> str:
    """Which class takes the place of which.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    pairs = report["replacements"]
    if not pairs:
        return ""
    involved: Counter[str] = Counter()
    for pair in pairs:
        involved[pair["class"]] += pair["count"]
        involved[pair["replaced_by"]] += pair["count"]
    shown = sorted(name for name, _ in involved.most_common(_MATRIX))
    counts = {(pair["class"], pair["replaced_by"]): pair["count"] for pair in pairs}
    most = max(counts.values())
    heads = "".join(f"<th><span>{escape(name)}</span></th>" for name in shown)
    rows = []
    for true in shown:
        cells = "".join(_shade(counts.get((true, instead), 0), most) for instead in shown)
        rows.append(f"<tr><th>{escape(true)}</th>{cells}</tr>")
    rest = f" The {_MATRIX} classes most involved; all are in report.json." if len(involved) > _MATRIX else ""
    return (
        '<section><h2>What replaces what</h2><table class="matrix"><caption>Negative flips: the true class, which the '
        f"old model predicts (row), and what the new model predicts instead (column).{rest}</caption><thead><tr>"
        f"<th></th>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def _shade(count: int, most: int) -> str:
    if not count:
        return "<td></td>"
    depth = 0.12 + 0.88 * count / most
    ink = "#ffffff" if depth > 0.6 else "#111827"
    return f'<td style="background:rgba(180,35,24,{depth:.2f});color:{ink}">{count}</td>'


def gallery_section(report: Report, shown: Sequence[Report], images: Mapping[int, str]) -> str:
    """Flipped images with both answers.

    Args:
        report: The report.
        shown: The flips to show.
        images: Their thumbnails by index.

    Returns:
        HTML.
    """
    total = len(report["negative_flips"])
    if not total:
        return "<section><h2>Negative flips</h2><p>None: the new model breaks no answer.</p></section>"
    figures = []
    for flip in shown:
        old, new = (f"{escape(flip[role]['prediction'])}{_sure(flip[role]['confidence'])}" for role in ("old", "new"))
        figures.append(
            f'<figure><img alt="{escape(flip["class"])}" src="{images[flip["index"]]}"><figcaption>'
            f'<span class="was">old: {old}</span><br><span class="now">new: {new}</span><br>'
            f"<small>{escape(flip['path'])}</small></figcaption></figure>"
        )
    caption = f"{len(shown)} of {total:,}, those first that the new model is surest of. All are in report.json."
    return (
        f'<section><h2>Negative flips</h2><p class="soft">{caption}</p><div class="gallery">{"".join(figures)}</div>'
        "</section>"
    )


def _sure(confidence: float | None) -> str:
    return "" if confidence is None else f" ({100 * confidence:.1f} %)"


def classes_section(report: Report) -> str:
    """Rates of each class.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    classes = report["flips"]["classes"]
    heads = ("class", "images", "NFR", "negative flips", "positive flips", "error, old", "error, new")
    highest = max((row["nfr"] for row in classes), default=0.0) or 1.0
    rows = []
    for row in classes[:_CLASSES]:
        between = interval("nfr", {"low": row["nfr_low"], "high": row["nfr_high"]}, row["number"])
        bar = f'<i class="bar" style="width:{90 * row["nfr"] / highest:.0f}px"></i>'
        rows.append(
            f"<tr><td>{escape(row['class'])}</td><td>{row['number']:,}</td><td>{bar}{number('nfr', row['nfr'])}"
            f"<small>{between}</small></td><td>{row['negative_flips']:,}</td><td>{row['positive_flips']:,}</td>"
            f"<td>{number('error_old', row['error_old'])}</td><td>{number('error_new', row['error_new'])}</td></tr>"
        )
    rest = f" The first {_CLASSES} of {len(classes):,}; all are in report.json." if len(classes) > _CLASSES else ""
    return (
        f"<section><h2>Classes</h2><table><caption>Sorted by negative flip rate.{rest}</caption><thead><tr>"
        f"{''.join(f'<th>{head}</th>' for head in heads)}</tr></thead><tbody>{''.join(rows)}</tbody></table></section>"
    )


def provenance_section(report: Report) -> str:
    """Where everything came from.

    Args:
        report: The report.

    Returns:
        HTML.
    """
    provenance = report["provenance"]
    facts = {}
    for role in ("old", "new"):
        model = report["models"][role]
        files = ", ".join(model["checkpoints"]) or model["name"]
        facts[f"{role} model"] = f"{files}; {model['classes']} classes; fingerprint {model['fingerprint']}"
    if report["averages"]["chosen"]:
        facts["average"] = f"{report['averages']['checkpoint']}; fingerprint {report['averages']['fingerprint']}"
    facts |= {
        "data": f"{provenance['data']}, split {report['split']}",
        "intervals": f"{provenance['resamples']:,} bootstrap draws, seed {provenance['seed']}",
        "date": provenance["date"],
        "device": provenance["device"],
        "folder": provenance["folder"],
        "command": " ".join(provenance["command"]),
    }
    items = "".join(f"<dt>{escape(name)}</dt><dd><code>{escape(value)}</code></dd>" for name, value in facts.items())
    return f"<section><h2>Where this comes from</h2><dl>{items}</dl></section>"
