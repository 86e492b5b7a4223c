"""The last words of a run."""

import json
import textwrap
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text

from lqf_lightning.methods import Method
from lqf_lightning.run_folder import write_json

OUTLOOK = "outlook.json"
_WIDTH = 110


@rank_zero_only
def keep_outlook(folder: Path, method: Method) -> None:
    """Keep what leave-one-out said before training, for the end of the run; a resumed run has it from its first start.

    Args:
        folder: The run folder.
        method: The method after training; one that gives no advice leaves the folder as it is.
    """
    outlook = getattr(method, "outlook", None)
    if outlook is not None:
        write_json(folder / OUTLOOK, asdict(outlook))


@rank_zero_only
def print_summary(folder: Path, metrics: dict[str, float], config: DictConfig) -> None:
    """Print the results, where they lie, how to look at them and what to try next, with the advice of `keep_outlook`.

    Args:
        folder: The run folder.
        metrics: The final metrics.
        config: The composed configuration.
    """
    exact = "train/relative_gradient" in metrics  # tested at the certified optimum, which the last checkpoint holds
    outlook = _read_outlook(folder)
    console = Console(width=None if Console().is_terminal else _WIDTH)
    console.print(_results(metrics, config, outlook))
    console.rule("where and what next")
    # As text, without a frame: paths may hold brackets, and are there to be copied.
    console.print(Text("\n".join(_places(folder) + _advice(outlook) + _next_steps(folder, exact))), soft_wrap=True)


def _results(metrics: dict[str, float], config: DictConfig, outlook: dict[str, Any]) -> Table:
    table = Table(title=f"{_stem(config.method._target_)} on {_stem(config.data.source._target_)}")
    for column in ("", "accuracy", "loss", "calibration error"):
        table.add_column(column, justify="right" if column else "left")
    for stage in ("train", "val", "test"):
        if f"{stage}/acc" in metrics:
            values = (metrics.get(f"{stage}/{name}") for name in ("acc", "loss", "ece"))
            table.add_row(stage, *("" if value is None else f"{value:.4f}" for value in values))
        if f"{stage}/teacher_acc" in metrics:
            values = (metrics[f"{stage}/teacher_{name}"] for name in ("acc", "loss"))
            table.add_row(f"{stage}, averaged teacher", *(f"{value:.4f}" for value in values), "")
    if "train/relative_gradient" in metrics:
        table.add_row(f"relative gradient {metrics['train/relative_gradient']:.2g}", "", "", "")
        table.add_row(f"dw is within {metrics['train/distance_bound']:.3g} of the optimum", "", "", "")
    for stage in ("val", "test"):
        if f"{stage}/linear_probe_acc" in metrics:
            probe = metrics[f"{stage}/linear_probe_acc"]
            table.add_row(f"{stage}, linear probe on the same features", f"{probe:.4f}", "", "")
        for prefix, whose in (("", "features"), ("teacher_", "the teacher's features")):
            if f"{stage}/{prefix}knn_acc" in metrics:
                votes = f"{metrics[f'{stage}/{prefix}knn_acc']:.4f}"
                table.add_row(f"{stage}, nearest neighbors in {whose}", votes, "", "")
    if outlook:
        kind = "LQF" if outlook["exact"] else "LQF by its surrogate"
        table.add_row("leave-one-out, linear probe", f"{outlook['probe']:.4f}", "", "")
        table.add_row(f"leave-one-out, {kind}", f"{outlook['linear']:.4f}", "", "")
    return table


def _read_outlook(folder: Path) -> dict[str, Any]:
    # Empty where the method gave none.
    file = folder / OUTLOOK
    return dict(json.loads(file.read_text())) if file.exists() else {}


def _advice(outlook: dict[str, Any]) -> list[str]:
    # Commands are there to be copied, so that no word is cut.
    words = outlook.get("words", "")
    return textwrap.wrap(words, _WIDTH, subsequent_indent="  ", break_long_words=False, break_on_hyphens=False)


def _places(folder: Path) -> list[str]:
    lines = [f"Run folder: {folder}", "  metrics.json, config.yaml, manifest.parquet, checkpoints/"]
    lines += [f"  {picture.relative_to(folder)}" for picture in sorted((folder / "pictures").glob("*.png"))]
    for run in sorted((folder / "wandb").glob("offline-run-*")):
        lines += ["W&B, written offline; upload it, or look at it in the terminal:"]
        lines += [f"  wandb sync {run}", f"  wandb leet {run}"]
    return lines


def _next_steps(folder: Path, exact: bool) -> list[str]:
    lines = [
        "Next: your own images, a folder per class:  lqf-train data=folder data.source.root=PATH",
        "      ordinary fine-tuning for comparison:  lqf-train method=finetune",
        "      both, as a sweep with two seeds:      lqf-train -m method=finetune,lqf seed=0,1",
    ]
    kept = [folder / "checkpoints" / f"{name}.ckpt" for name in (("last",) if exact else ("best", "last"))]
    lines += [f"      this model on the test set again:     lqf-eval checkpoint={c}" for c in kept if c.exists()][:1]
    return lines


def _stem(target: str) -> str:
    return target.rpartition(".")[2]
