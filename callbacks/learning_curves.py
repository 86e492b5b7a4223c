"""Pictures of a run: loss and accuracy over epochs, and a confusion matrix of the test set."""

from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from lqf_lightning.linear import current_reducer

from .pictures import save_picture

_CURVES = {
    "train/loss": "o-",
    "val/loss": "s-",
    "val/teacher_loss": "^--",
    "train/acc": "o-",
    "val/acc": "s-",
    "val/teacher_acc": "^--",
}
_PROBE = "val/linear_probe_acc"


class LearningCurves(Callback):
    """Draws ``pictures/learning_curves.png`` after every epoch and ``pictures/confusion.png`` after the test.

    The curves go on where they were when a run is resumed.
    """

    def __init__(self) -> None:
        self.history: list[dict[str, float]] = []
        self._validated = False
        self._counts = torch.zeros(0, 0)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Note that this epoch has validation metrics of its own."""
        self._validated = True

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Add the epoch's metrics and draw again."""
        metrics = trainer.callback_metrics  # reduced over ranks when read, hence read on every rank
        names = [name for name in (*_CURVES, _PROBE) if self._validated or not name.startswith("val/")]
        row = {name: float(metrics[name]) for name in names if name in metrics}
        self.history.append({"epoch": trainer.current_epoch, **row})
        self._validated = False
        save_picture(trainer, draw_learning_curves(self.history), "learning_curves", upload=False)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Show the whole picture in the trackers, whatever ended the training."""
        if self.history:
            save_picture(trainer, draw_learning_curves(self.history), "learning_curves")

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Show what a failed run had reached."""
        if self.history:
            save_picture(trainer, draw_learning_curves(self.history), "learning_curves")

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to count."""
        number = len(_classes(pl_module))
        self._counts = torch.zeros(number, number, dtype=torch.int64, device=pl_module.device)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, *_: Any
    ) -> None:
        """Count the predictions of a batch."""
        ones = torch.ones_like(batch.target)
        self._counts.index_put_((batch.target, outputs["logits"].argmax(-1)), ones, accumulate=True)

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw the confusion matrix."""
        counts = current_reducer().sum_(self._counts).cpu()
        save_picture(trainer, draw_confusion(counts, _classes(pl_module)), "confusion")

    def state_dict(self) -> dict[str, Any]:
        """Keep the history.

        Returns:
            One dictionary per epoch.
        """
        return {"history": self.history}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the history of the interrupted run."""
        self.history = list(state_dict["history"])


def draw_learning_curves(history: list[dict[str, float]]) -> Figure:
    """Loss and accuracy over epochs, for training and validation, and for an averaged teacher where there is one.

    Args:
        history: One dictionary per epoch, with "epoch" and metric values.

    Returns:
        A figure of two panels.
    """
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    panels = dict(zip(("loss", "acc"), figure.subplots(1, 2), strict=True))
    for curve, style in _CURVES.items():
        stage, _, name = curve.partition("/")
        points = [(row["epoch"] + 1, row[curve]) for row in history if curve in row]
        if points:
            label = f"{stage}, averaged teacher" if name.startswith("teacher_") else stage
            panels[name.removeprefix("teacher_")].plot(*zip(*points, strict=True), style, label=label, markersize=4)
    probe = [row[_PROBE] for row in history if _PROBE in row]
    if probe:
        panels["acc"].axhline(probe[-1], color="gray", linestyle="--", label="val, linear probe")
    for name, title in (("loss", "loss"), ("acc", "accuracy")):
        panels[name].set(xlabel="epoch", title=title)
        panels[name].xaxis.set_major_locator(MaxNLocator(integer=True))
        panels[name].grid(alpha=0.3)
        panels[name].legend()
    return figure


def draw_confusion(counts: Tensor, classes: list[str]) -> Figure:
    """Share of each true class (row) that was given each predicted class (column).

    Args:
        counts: Numbers of samples (C, C), true class by predicted class.
        classes: Class names.

    Returns:
        A figure; cells carry counts where there is room for them.
    """
    number = len(classes)
    shares = counts / counts.sum(1, keepdim=True).clamp(min=1)
    side = min(4 + 0.28 * number, 16)
    figure = Figure(figsize=(side, side), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    figure.colorbar(image, shrink=0.7, label="share of the true class")
    axes.set(xlabel="predicted", ylabel="true", title=f"accuracy {counts.diagonal().sum() / counts.sum():.4f}")
    if number <= 60:
        axes.set_xticks(range(number), classes, rotation=90, parse_math=False)
        axes.set_yticks(range(number), classes, parse_math=False)
    if number <= 20:
        for row, column in torch.nonzero(counts).tolist():
            color = "white" if shares[row, column] > 0.5 else "black"
            axes.text(column, row, str(int(counts[row, column])), ha="center", va="center", color=color, fontsize=8)
    return figure


def _classes(module: LightningModule) -> list[str]:
    # A Method has them; Lightning's hooks promise no more than a LightningModule.
    classes: list[str] = module.classes  # type: ignore[assignment]
    return classes
