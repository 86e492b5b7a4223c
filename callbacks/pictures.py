"""Figures into the run folder and the trackers."""

from pathlib import Path

from lightning import Trainer
from lightning.pytorch.loggers import WandbLogger
from matplotlib.figure import Figure


def save_picture(trainer: Trainer, figure: Figure, name: str, *, upload: bool = True) -> Path | None:
    """Write a figure as ``pictures/NAME.png`` in the run folder, and show it in W&B; rank 0 only.

    Args:
        trainer: The running trainer.
        figure: The figure.
        name: File name without ending, also the key in W&B, below ``pictures/``.
        upload: Also log it to W&B.

    Returns:
        The file, or None on other ranks.
    """
    if not trainer.is_global_zero:
        return None
    path = Path(trainer.default_root_dir) / "pictures" / f"{name}.png"
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    for logger in trainer.loggers:
        if upload and isinstance(logger, WandbLogger):
            logger.log_image(f"pictures/{name}", [str(path)])
    return path
