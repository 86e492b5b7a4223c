import numpy as np
import pytest
from PIL import Image

from lqf_lightning.data import FolderSource, ImageDataModule

HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


def write_images(folder, count, seed=0, size=(12, 10), suffix="png"):
    rng = np.random.default_rng([seed, *folder.name.encode()])
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(count):
        pixels = rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{number:03d}.{suffix}")


@pytest.fixture
def add_images():
    """Writes noise into a folder; its name and a seed decide which."""
    return write_images


@pytest.fixture
def split_folder(tmp_path):
    """Three classes of 10 training and 5, 4 and 4 test images."""
    root = tmp_path / "images"
    for number, name in enumerate(("ant", "bee", "cat")):
        write_images(root / "train" / name, 10)
        write_images(root / "test" / name, 5 if number == 0 else 4, seed=1)
    return root


@pytest.fixture
def make_module(split_folder):
    def make(**options):
        options = {"image_size": 8, "batch_size": 6, "num_workers": 0, **options}
        data = ImageDataModule(FolderSource(split_folder), **options)
        data.setup()
        data.normalization = HALF
        return data

    return make
