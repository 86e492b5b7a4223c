"""Models in use, and pictures that they and their successors get partly wrong."""

from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn

from lqf_lightning.data import FolderSource, ImageDataModule
from lqf_lightning.teachers import FrozenTeacher, View

CLASSES = ["ant", "bee", "cat"]
VIEW = View(6, 1.0, (0.5,) * 3, (0.5,) * 3)
COUNTS = {"train": 8, "val": 7, "test": 6}


def write_noise(root: Path, counts: dict[str, int] = COUNTS, *, uneven: bool = True) -> Path:
    """Pictures without any sense; if uneven, one more of the second class and two more of the third."""
    generator = torch.Generator().manual_seed(0)
    for part, count in counts.items():
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for number in range(count + uneven * label):
                pixels = torch.randint(0, 256, (8, 8, 3), generator=generator)
                Image.fromarray(pixels.byte().numpy()).save(root / part / name / f"{number}.png")
    return root


def noise_data(root: Path, *, view: View = VIEW, **options: object) -> ImageDataModule:
    """The data module of a model with this view."""
    settings = {"image_size": view.image_size, "crop_fraction": view.crop_fraction, "batch_size": 6, "num_workers": 0}
    data = ImageDataModule(FolderSource(root), **{**settings, **options})
    data.setup()
    data.normalization = (view.mean, view.std)
    return data


def old_model(seed: int = 5, classes: list[str] = CLASSES, view: View = VIEW) -> FrozenTeacher:
    """A linear classifier of centered pixels; random, so that every class comes up."""
    torch.manual_seed(seed)
    size = view.image_size
    norm = nn.BatchNorm2d(3)
    layers = nn.Sequential(norm, nn.Dropout(0.5), nn.ReLU(), nn.Flatten(), nn.Linear(3 * size**2, len(classes)))
    norm.running_var.fill_(2.0)
    nn.init.zeros_(layers[-1].bias)
    return FrozenTeacher(layers, classes, view, f"old{seed}")


@torch.no_grad()
def outputs_of(model: nn.Module, batches: object) -> tuple[Tensor, Tensor]:
    """Outputs and indices of all batches."""
    training = model.training
    model.eval()
    found = [(model(batch.input), batch.index) for batch in batches]
    model.train(training)
    return torch.cat([rows for rows, _ in found]), torch.cat([index for _, index in found])
