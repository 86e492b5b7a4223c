"""A comparison on the terminal and in the trackers."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger, WandbLogger
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lqf_lightning.comparison.words import QUANTITIES, interval, number, values_of

Report = Mapping[str, Any]


def log_comparison(loggers: Sequence[Logger], report: Report, page: Path) -> dict[str, float]:
    """Give the numbers to the trackers, and the page to W&B.

    Args:
        loggers: The trackers.
        report: The report.
        page: The written page.

    Returns:
        Metrics ``SPLIT/NAME``, and ``SPLIT/average_NAME`` of the chosen average; quantities that are undefined are
        left out.
    """
    split = report["split"]
    metrics = _metrics(report["flips"], f"{split}/")
    if report["averages"]["chosen"]:
        metrics |= _metrics(report["averages"]["result"], f"{split}/average_")
    for logger in loggers:
        logger.log_metrics(metrics)
        if isinstance(logger, WandbLogger):
            import wandb  # takes a second, which comparisons without it need not wait

            logger.experiment.log({"report": wandb.Html(page.read_text(encoding="utf-8"), inject=False)})
        logger.save()
        logger.finalize("success")
    return metrics


def print_comparison(report: Report, folder: Path) -> None:
    """Print the verdict, the rates and where the report lies.

    Args:
        report: The report.
        folder: The folder of the comparison.
    """
    console = Console(width=None if Console().is_terminal else 110)
    flips, averages = report["flips"], report["averages"]
    columns = {"old": (flips, "old"), "new": (flips, "new")}
    if averages["chosen"]:
        columns[f"average ({averages['chosen']['kind']} {averages['chosen']['share']:g})"] = (averages["result"], "new")
    table = Table(title=f"{flips['number']:,} {report['split']} images")
    table.add_column("")
    for title in columns:
        table.add_column(Text(title), justify="right")
    for name, (title, _) in QUANTITIES.items():
        table.add_row(title, *(_cell(name, *column) for column in columns.values()))
    console.print(table)
    for line in [report["verdict"], *report["warnings"], _no_averages(report), f"Report: {folder / 'report.html'}"]:
        if line:
            console.print(Text(line), soft_wrap=True)


def _cell(name: str, flips: Report, role: str) -> str:
    values = values_of(flips, name, role)
    if values is None:
        return ""
    between = interval(name, values, flips["number"])
    return f"{number(name, values['estimate'])}\n[dim]{between}[/dim]"


def _no_averages(report: Report) -> str:
    reason = report["averages"]["reason"]
    return f"No weight averages: {reason}." if reason else ""


def _metrics(flips: Report, prefix: str) -> dict[str, float]:
    values = {name: entry["estimate"] for name, entry in flips["metrics"].items()}
    values |= {"agreement": flips["agreement"]}
    return {f"{prefix}{name}": value for name, value in values.items() if value is not None}
