"""Small data, small networks and the composed configurations that the tests of the shell share."""

import os
from pathlib import Path

import hydra
import numpy as np
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig
from PIL import Image

CLASSES = ("blue", "green", "red")


def write_shapes(root: Path, *, per_class: int, seed: int, extra: int = 0, size: int = 16) -> None:
    """Noisy pictures tinted by class; the first class gets `extra` more, so that ranks get uneven shares."""
    rng = np.random.default_rng(seed)
    for position, name in enumerate(CLASSES):
        (root / name).mkdir(parents=True)
        for number in range(per_class + (extra if position == 0 else 0)):
            pixels = rng.integers(0, 150, (size, size, 3))
            pixels[..., 2 - position] += 60
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{number:03d}.png")


def tiny_overrides(data_root: Path) -> list[str]:
    """A run of seconds: 24 training images of 32 pixels, a network of 0.4 million weights, two epochs."""
    return [
        "data=folder", f"data.source.root={data_root}", "data.image_size=32", "data.batch_size=12",
        "data.num_workers=0", "backbone=timm", "backbone.name=test_resnet", "backbone.weights=null",
        "trainer.max_epochs=2", "progress=none", "method.optimizer.lr=0.001",
    ]  # fmt: skip


def compose(*overrides: str, name: str = "train") -> DictConfig:
    """Compose one of our configurations, as the command line would."""
    GlobalHydra.instance().clear()
    with hydra.initialize_config_module("lqf_lightning.conf", version_base="1.3"):
        return hydra.compose(name, overrides=list(overrides))


def run_tiny(output: Path, data_root: Path, *overrides: str) -> dict[str, float]:
    """Train in this process, without loggers unless asked for; returns the metrics."""
    from lqf_lightning.train import train

    loggers = [] if any(o.startswith("logger=") for o in overrides) else ["logger=[]"]
    loggers += [] if any(o.startswith("method=") for o in overrides) else ["method=lqf_sgd"]
    config = compose(*tiny_overrides(data_root), *loggers, f"paths.output_dir={output}", *overrides)
    environment = dict(os.environ)
    try:
        return train(config)
    finally:
        os.environ.clear()
        os.environ.update(environment)
