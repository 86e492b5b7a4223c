"""The page of a deletion: one file that a privacy officer reads, prints and keeps."""

from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

from lqf_lightning.comparison.style import STYLE
from lqf_lightning.deletion.judgement import judge
from lqf_lightning.deletion.report_behavior import behavior_section
from lqf_lightning.deletion.report_sections import (
    bound_section,
    hashes_section,
    limits_section,
    removal_section,
    request_section,
    scrub_section,
    tiles,
)

Report = Mapping[str, Any]
_OWN_STYLE = """
.failed { border: 3px solid var(--bad); background: #fef3f2; color: var(--bad); }
.failed h2 { font-size: 26px; } .failed p { font-size: 17px; font-weight: 600; }
.passed { border-left: 4px solid var(--good); }
.caution li { margin: 4px 0; } figure.curve { max-width: 760px; margin: 14px 0; }
figure.curve img { width: auto; max-width: 100%; max-height: 300px; }
.compared td + td, .compared th { white-space: nowrap; }
@page { size: A4; margin: 14mm; }
@media print { main { max-width: none; padding: 0; } section, .tile { border-color: #999; }
  body { font-size: 11px; } h1 { font-size: 20px; } h2 { font-size: 14px; } .failed h2 { font-size: 20px; }
  section { break-inside: auto; padding: 10px 14px; margin: 10px 0; } h2 { break-after: avoid; }
  figure, tr, dl, .tiles, .failed, .caution { break-inside: avoid; } td, th { padding: 3px 8px; }
  .tile { flex-basis: 110px; padding: 8px 12px; } .tile b { font-size: 18px; } td small { font-size: 10px; }
  figure.curve img { max-height: 190px; }
  * { -webkit-print-color-adjust: exact; print-color-adjust: exact; } }
"""


def write_report(folder: Path, report: Report) -> Path:
    """Write the page, whole or not at all.

    Args:
        folder: Where to; it exists.
        report: The report, as in ``report.json``. Without a judgement in it, it is judged here.

    Returns:
        The file, ``report.html``: one file without scripts, which needs no other.
    """
    judgement = report.get("judgement") or judge(report)
    title = f"Deletion of {report['request']['number']:,} samples from {report['request']['run']}"
    parts = [
        f"<h1>{escape(title)}</h1>", f'<p class="soft">{escape(str(report["request"]["date"]))}</p>',
        _verdict(judgement), tiles(report), request_section(report), scrub_section(report), bound_section(report),
        behavior_section(report), limits_section(report), removal_section(report), hashes_section(report),
    ]  # fmt: skip
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{STYLE}{_OWN_STYLE}</style></head>\n"
        f"<body><main>\n{chr(10).join(parts)}\n</main></body></html>\n"
    )
    path = folder / "report.html"
    partial = path.with_name(path.name + ".partial")
    partial.write_text(page, encoding="utf-8")
    partial.replace(path)
    return path


def _verdict(judgement: Report) -> str:
    flags = list(judgement["flags"])
    failures = list(judgement.get("failures", [] if judgement["passed"] else flags))
    cautions = [flag for flag in flags if flag not in failures]
    verdict = escape(judgement["verdict"])
    if judgement["passed"]:
        top = f'<section class="passed"><p class="verdict">{verdict}</p></section>'
    else:
        reasons = "".join(f"<p>{escape(text)}</p>" for text in failures)
        top = f'<section class="failed"><h2>{verdict}</h2>{reasons}</section>'
    if not cautions:
        return top
    listed = "".join(f"<li>{escape(text)}</li>" for text in cautions)
    return f'{top}<section class="warning caution"><h2>Before you rely on this</h2><ul>{listed}</ul></section>'
