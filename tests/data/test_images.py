import numpy as np
import pytest
from PIL import Image

from lqf_lightning.data import ArrayImages, FileImages


def read_pixels(folder, image, name="a.png", **options):
    image.save(folder / name, **options)
    decoded = FileImages(folder, [name]).read(0)
    assert decoded.mode == "RGB"
    return np.asarray(decoded)


def test_gray_becomes_rgb(tmp_path):
    gray = np.arange(64, dtype=np.uint8).reshape(8, 8)
    assert (read_pixels(tmp_path, Image.fromarray(gray)) == gray[..., None]).all()


def test_sixteen_bits_are_scaled_rather_than_clipped(tmp_path):
    deep = np.linspace(0, 65535, 64).astype(np.uint16).reshape(8, 8)
    assert (read_pixels(tmp_path, Image.fromarray(deep)) == (deep // 256)[..., None]).all()


def test_palettes_with_transparency_keep_their_colors(tmp_path):
    image = Image.new("P", (4, 4), 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert (read_pixels(tmp_path, image, transparency=b"\x00\xff") == [200, 100, 50]).all()


def test_pixels_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((4, 4), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(OSError, match="8 or 16 bits"):
        FileImages(tmp_path, ["a.tif"]).read(0)


def test_arrays_are_told_apart_by_shape():
    tall, wide = np.zeros((1, 8, 2), dtype=np.uint8), np.zeros((1, 2, 8), dtype=np.uint8)
    assert ArrayImages(tall, "a").content(0) != ArrayImages(wide, "a").content(0)
    assert ArrayImages(tall, "a").read(0).size == (2, 8)
