"""The last line of a benchmark: one JSON object with its figures, and what they were measured on."""

import datetime
import json
import platform
from pathlib import Path
from typing import Any

import timm
import torch
from step_cost import cpu_name


def write_report(report: dict[str, Any], output: Path | None) -> None:
    """Add machine, date and versions, print the report, and write it to a file if one is named."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    known = {
        "machine": gpu or f"{cpu_name()}, one thread, shared with other programs", "date": str(datetime.date.today()),
        "torch": torch.__version__, "timm": timm.__version__, "python": platform.python_version(),
    }  # fmt: skip
    text = json.dumps(report | known)
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(text + "\n")
    print(text)
