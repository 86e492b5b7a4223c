import inspect
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from omegaconf import OmegaConf
from PIL import Image

from lqf_lightning.data import CropFlip, TwoViews, WeakStrong

CONF = sorted((Path(__file__).parents[2] / "conf" / "method" / "views").glob("*.yaml"))
PIXELS = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
PICTURE = Image.fromarray(PIXELS)
STILL = {"scale": (1, 1), "flip": 0, "jitter_probability": 0, "grayscale": 0, "blur": (0, 0)}


def draw(transform, seed=0, picture=PICTURE):
    torch.manual_seed(seed)
    return [np.asarray(view).astype(int) for view in transform(picture)]


def test_without_any_change_both_views_are_the_image():
    for view in draw(TwoViews(20, 0.9, **STILL)):
        assert (view == PIXELS).all()


def test_the_views_of_an_image_differ_and_can_be_drawn_again():
    transform = TwoViews(16, 0.9)
    first, second = draw(transform)
    assert first.shape == second.shape == (16, 16, 3)
    assert (first != second).mean() > 0.5
    assert all((a == b).all() for a, b in zip(draw(transform), (first, second), strict=True))
    assert (draw(transform, seed=1)[0] != first).mean() > 0.5


def test_flips_and_gray():
    assert all((view == PIXELS[:, ::-1]).all() for view in draw(TwoViews(20, 0.9, **STILL | {"flip": 1})))
    gray, _ = draw(TwoViews(20, 0.9, **STILL | {"grayscale": 1}))
    # ITU-R 601 luma, rounded by Pillow
    assert np.abs(gray - (PIXELS @ [0.299, 0.587, 0.114])[..., None]).max() <= 1


def test_bright_pixels_of_one_view_alone_are_inverted():
    first, second = draw(TwoViews(20, 0.9, **STILL, solarize=(0, 1)))
    assert (first == PIXELS).all()
    assert (second == np.where(PIXELS >= 128, 255 - PIXELS, PIXELS)).all()


@pytest.mark.parametrize(("size", "width"), [(16, 3), (40, 5), (100, 11)])
@pytest.mark.parametrize("view", [0, 1])
def test_a_blur_spreads_a_point_over_a_tenth_of_the_size(size, width, view):
    pixels = np.zeros((size, size, 3), dtype=np.uint8)
    pixels[size // 2, size // 2] = 255
    blur = {"blur": (1 - view, view), "blur_sigma": (50, 50)}  # so wide that all weights are alike
    views = draw(TwoViews(size, 0.9, **STILL | blur), picture=Image.fromarray(pixels))
    assert (views[1 - view] == pixels).all()
    assert (views[view][..., 0] > 0).sum() == width**2
    assert abs(views[view].max() - 255 / width**2) < 1


def test_brightness_stays_in_its_range():
    # a gray image keeps its color under saturation and hue, and its one value under contrast
    gray = Image.new("RGB", (20, 20), (100, 100, 100))
    jitter = {"jitter": (0.4, 0, 0, 0), "jitter_probability": 1}
    values = [view[0, 0, 0] for seed in range(100) for view in draw(TwoViews(20, 0.9, **STILL | jitter), seed, gray)]
    assert 60 <= min(values) < 65 < 135 < max(values) <= 140  # 200 draws: within 5 of each end but for (7/8)^200


def test_parts_have_areas_of_the_scale():
    # red grows to the right and green downwards, so that the range of values tells the part
    ramp = np.arange(256, dtype=np.uint8)
    pixels = np.stack(np.broadcast_arrays(ramp[None], ramp[:, None], 0), -1).astype(np.uint8)
    transform = TwoViews(64, 0.9, **STILL | {"scale": (0.25, 0.5)})
    areas = []
    for seed in range(40):
        for view in draw(transform, seed, Image.fromarray(pixels)):
            areas.append(np.ptp(view[..., 0]) * np.ptp(view[..., 1]) / 256**2)
    assert 0.22 < min(areas) < 0.3 < 0.45 < max(areas) < 0.52


def identity(image):
    return image


def test_the_weak_view_is_that_of_ordinary_training():
    augmentation = CropFlip(size=16, crop_fraction=0.9)
    torch.manual_seed(0)
    expected = np.asarray(augmentation(PICTURE))
    weak, strong = draw(WeakStrong(16, 0.9, augmentation))
    assert (weak == expected).all()
    assert strong.shape == (16, 16, 3)


def test_the_strong_view_starts_from_an_augmentation_of_its_own():
    transform = WeakStrong(16, 0.9, CropFlip(size=16, crop_fraction=0.9))
    transform.changes = [identity] * 9
    assert all((np.subtract(*draw(transform, seed)) != 0).mean() > 0.5 for seed in range(5))


def test_every_change_has_an_integer_strength_of_its_own():
    transform = WeakStrong(20, 0.9, identity, operations=3, magnitude=(2, 4))
    found = Counter()

    def note(strength):
        def change(image):
            found[strength] += 1
            return image

        return change

    transform.changes = [note(change.magnitude) for change in transform.changes]
    pairs = set()
    torch.manual_seed(0)
    for _ in range(400):
        before = found.copy()
        transform(PICTURE)
        pairs.add(tuple(sorted((found - before).items())))
    assert set(found) == {2, 3, 4}
    assert found.total() == 1200
    # binomial(1200, 1/3): standard deviation 16.3
    assert all(abs(count - 400) < 5 * 16.3 for count in found.values())
    assert len(pairs) == 10  # all multisets of three


def test_a_strength_is_in_tenths_of_the_greatest():
    transform = WeakStrong(20, 0.9, identity, operations=1, magnitude=(3, 3))
    (change,) = transform.changes
    change._AUGMENTATION_SPACE = {"Brightness": change._AUGMENTATION_SPACE["Brightness"]}  # factor 1 +- 0.9 at most
    gray = Image.new("RGB", (20, 20), (100, 100, 100))
    values = {int(draw(transform, seed, gray)[1][0, 0, 0]) for seed in range(20)}
    assert values == {73, 127}


def test_strong_views_can_be_drawn_again():
    transform = WeakStrong(20, 0.9, identity)
    assert (draw(transform, 5)[1] == draw(transform, 5)[1]).all()
    assert len({draw(transform, seed)[1].tobytes() for seed in range(20)}) > 12
    assert all((draw(transform, seed)[0] == PIXELS).all() for seed in range(20))


@pytest.mark.parametrize(
    "options",
    [{"scale": (0, 1)}, {"scale": (0.5, 0.2)}, {"scale": (0.5, 1.1)}, {"flip": 1.5}, {"jitter": (0.4, 0.4, 0.4)},
     {"jitter": (0.4, 0.4, 0.4, 0.6)}, {"jitter_probability": -1}, {"grayscale": 2}, {"blur": (0.5,)},
     {"blur": (0.5, 1.5)}, {"blur_sigma": (0, 1)}, {"solarize": (0.5, -0.1)}],
)  # fmt: skip
def test_options_of_two_views_out_of_range_name_their_override(options):
    with pytest.raises(ValueError, match=rf"Set method\.views\.{next(iter(options))}="):
        TwoViews(20, 0.9, **options)


@pytest.mark.parametrize(
    "options", [{"operations": 0}, {"magnitude": (3,)}, {"magnitude": (5, 2)}, {"magnitude": (1, 11)},
                {"magnitude": (-1, 2)}, {"magnitude": (1.5, 2)}],
)  # fmt: skip
def test_options_of_a_strong_view_out_of_range_name_their_override(options):
    with pytest.raises(ValueError, match=rf"Set method\.views\.{next(iter(options))}="):
        WeakStrong(20, 0.9, identity, **options)


@pytest.mark.parametrize("path", CONF, ids=lambda path: path.stem)
def test_every_file_builds_its_views_from_plain_lists(path):
    written = OmegaConf.load(path)
    for views in (instantiate(written), instantiate(written, _convert_="all")):
        assert views.keywords.keys() == inspect.getfullargspec(views.func).kwonlydefaults.keys()
        transform = views(size=16, crop_fraction=0.9, weak=CropFlip(size=16, crop_fraction=0.9))
        assert [view.shape for view in draw(transform)] == [(16, 16, 3)] * 2
        assert transform.random


@pytest.mark.parametrize(("name", "views"), [("two_views", TwoViews), ("weak_strong", WeakStrong)])
def test_files_repeat_the_defaults_of_the_constructor(name, views):
    (path,) = (path for path in CONF if path.stem == name)
    defaults = inspect.getfullargspec(views).kwonlydefaults
    given = OmegaConf.to_container(OmegaConf.load(path))
    assert {key: given[key] for key in defaults} == {
        key: list(value) if isinstance(value, tuple) else value for key, value in defaults.items()
    }


def test_byol_treats_its_views_differently():
    (path,) = (path for path in CONF if path.stem == "byol")
    given = OmegaConf.load(path)
    assert (given.jitter, given.blur, given.solarize) == ([0.4, 0.4, 0.2, 0.1], [1.0, 0.1], [0.0, 0.2])
