"""The page of a comparison: one file that needs nothing else."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from lqf_lightning.comparison.pictures import thumbnails
from lqf_lightning.comparison.sections import (
    averages_section,
    classes_section,
    gallery_section,
    matrix_section,
    provenance_section,
)
from lqf_lightning.comparison.style import STYLE
from lqf_lightning.comparison.words import QUANTITIES, difference, difference_interval, interval, number, values_of
from lqf_lightning.data import ImageDataModule

Report = Mapping[str, Any]
_NAMES = 12  # classes that a sentence may list


def write_page(path: Path, report: Report, data: ImageDataModule, gallery: int) -> Path:
    """Write the page.

    Args:
        path: The file.
        report: The report, as in ``report.json``.
        data: Gives the images.
        gallery: Number of flipped images to show.

    Returns:
        The file.
    """
    shown = report["negative_flips"][:gallery]
    images = thumbnails(data, report["split"], [flip["index"] for flip in shown])
    parts = [
        _head(report), _tiles(report), _warnings(report), _metrics(report), averages_section(report),
        gallery_section(report, shown, images), matrix_section(report), classes_section(report),
        provenance_section(report),
    ]  # fmt: skip
    title = escape(f"{report['models']['new']['name']} against {report['models']['old']['name']}")
    body = "\n".join(part for part in parts if part)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{STYLE}</style></head>\n<body><main>\n{body}\n</main></body></html>\n"
    )
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _head(report: Report) -> str:
    old, new = (escape(report["models"][role]["name"]) for role in ("old", "new"))
    return (
        f'<h1>{new}</h1><p class="soft">in place of {old}, on {report["flips"]["number"]:,} {report["split"]} images'
        f'</p><p class="verdict">{escape(report["verdict"])}</p>'
    )


def _tiles(report: Report) -> str:
    flips, averages = report["flips"], report["averages"]
    tiles = [
        _tile("accuracy", "accuracy, old", flips, "old", ""),
        _tile("accuracy", "accuracy, new", flips, "new", ""),
        _tile("nfr", "negative flips (NFR)", flips, "new", "bad"),
        _tile("pfr", "positive flips (PFR)", flips, "new", "good"),
    ]
    if averages["chosen"]:
        title = f"NFR of the average ({averages['chosen']['kind']})"
        tiles.append(_tile("nfr", title, averages["result"], "new", "bad"))
    return f'<div class="tiles">{"".join(tiles)}</div>'


def _tile(name: str, title: str, flips: Report, role: str, style: str) -> str:
    values = values_of(flips, name, role) or {}
    between = interval(name, values, flips["number"])
    return (
        f'<div class="tile {style}"><span>{escape(title)}</span><b>{number(name, values["estimate"])}</b>'
        f"<span>{between}</span></div>"
    )


def _warnings(report: Report) -> str:
    sentences = list(report["warnings"])
    flips, unshared = report["flips"], report["unshared"]
    for role, names in (("new", unshared["only_new"]), ("old", unshared["only_old"])):
        if names:
            sentences.append(f"Only the {role} model knows {_listed(names)}.")
    if flips["left_out"]:
        sentences.append(
            f"{flips['left_out']:,} images of classes that not both models know can neither flip nor stay and are left "
            f"out of all rates; on all images of its classes the new model's error is "
            f"{number('error_new', flips['error_new_all'])}."
        )
    lines = "".join(f"<p>{escape(sentence)}</p>" for sentence in sentences)
    return f'<section class="warning">{lines}</section>' if lines else ""


def _metrics(report: Report) -> str:
    flips, averages = report["flips"], report["averages"]
    columns, head = [(flips, "old"), (flips, "new")], ["", "old", "new"]
    if averages["chosen"]:
        columns.append((averages["result"], "new"))
        head += [f"average ({averages['chosen']['kind']}, share {averages['chosen']['share']:g})", "average less new"]
    rows = []
    for name, (title, meaning) in QUANTITIES.items():
        cells = [f"<td>{escape(title)}<small>{escape(meaning)}</small></td>"]
        cells += [_cell(name, values_of(column, name, role), column["number"]) for column, role in columns]
        if averages["chosen"]:
            cells.append(_difference(name, averages["difference"]))
        rows.append(f"<tr>{''.join(cells)}</tr>")
    agreement = ["", *(number("agreement", column["agreement"]) for column, _ in columns[1:])]
    cells = [f"<td>{text}</td>" for text in agreement + ([""] if averages["chosen"] else [])]
    meaning = "Share of images for which it predicts the same class as the old model, right or wrong."
    rows.append(f"<tr><td>agreement<small>{meaning}</small></td>{''.join(cells)}</tr>")
    heads = "".join(f"<th>{escape(text)}</th>" for text in head)
    caption = f"In small print: {100 * report['level']:g} % bootstrap intervals over images."
    if averages["chosen"]:
        caption += " Differences are on the same images; where the interval holds 0, they may be chance."
    table = f"<table><caption>{caption}</caption><thead><tr>{heads}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f"<section><h2>Rates</h2>{table}</section>"


def _cell(name: str, values: Report | None, size: int) -> str:
    if values is None:
        return "<td></td>"
    return f"<td>{number(name, values['estimate'])}<small>{interval(name, values, size)}</small></td>"


def _difference(name: str, differences: Report) -> str:
    values = differences.get(f"{name}_new", differences.get(name))
    if values is None or values["estimate"] is None:
        return "<td></td>"
    return f"<td>{difference(name, values['estimate'])}<small>{difference_interval(name, values)}</small></td>"


def _listed(names: Sequence[str]) -> str:
    rest = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    return ", ".join(names[:_NAMES]) + rest
