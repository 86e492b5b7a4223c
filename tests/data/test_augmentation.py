import numpy as np
import pytest
import torch
from PIL import Image

from lqf_lightning.data import Crop, CropFlip, NoAugmentation, RandAugment, Shift


def gradient(width, height):
    """Red grows to the right, green downwards."""
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    pixels[..., 0] = np.arange(width) * 255 // (width - 1)
    pixels[..., 1] = (np.arange(height) * 255 // (height - 1))[:, None]
    return Image.fromarray(pixels)


def test_evaluation_keeps_the_center_square_of_the_shorter_side():
    image = np.asarray(NoAugmentation(size=64, crop_fraction=0.5)(gradient(200, 100))).astype(float)
    red, green = image[0, :, 0], image[:, 0, 1]
    # of 200 columns, 50 around the middle remain: from 3/8 to 5/8 of the range; of 100 rows, 50: from 1/4 to 3/4
    assert abs(red[0] - 255 * 3 / 8) < 3
    assert abs(red[-1] - 255 * 5 / 8) < 3
    assert abs(green[0] - 255 / 4) < 5
    assert abs(green[-1] - 255 * 3 / 4) < 5


def test_a_shift_moves_at_most_the_given_share_and_repeats_the_edge():
    image = gradient(64, 64)
    moves = set()
    for seed in range(100):
        torch.manual_seed(seed)
        shifted = np.asarray(Shift(size=64, crop_fraction=1.0, shift=0.125)(image)).astype(int)
        moves.add(round((shifted[32, 32, 0] - 255 * 32 / 63) / (255 / 63)))
        assert (np.diff(shifted[0, :, 0]) >= 0).all()
    assert min(moves) == -8
    assert max(moves) == 8


@pytest.mark.parametrize(("augmentation", "flips"), [(Crop, False), (CropFlip, True)])
def test_only_some_augmentations_mirror(augmentation, flips):
    transform = augmentation(size=16, crop_fraction=1.0)
    mirrored = 0
    for seed in range(100):
        torch.manual_seed(seed)
        row = np.asarray(transform(gradient(64, 64)))[8, :, 0].astype(int)
        mirrored += row[0] > row[-1]
    assert (30 < mirrored < 70) if flips else mirrored == 0


def test_randaugment_changes_colors():
    transform = RandAugment(size=16, crop_fraction=1.0, operations=2, magnitude=15)
    plain = Image.new("RGB", (32, 32), (120, 60, 30))
    outcomes = set()
    for seed in range(20):
        torch.manual_seed(seed)
        outcomes.add(np.asarray(transform(plain)).tobytes())
    assert len(outcomes) > 3
