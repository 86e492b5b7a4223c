import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from lqf_lightning.data import ArrayImages, CropFlip, FileImages, ImageDataset, NoAugmentation
from lqf_lightning.data.dataset import Collate, CorruptImageError, Record

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 9, 9, 3), dtype=np.uint8)
RECORDS = [Record(ArrayImages(PIXELS, "noise"), n, n % 2, 10 + n) for n in range(6)]
NORMALIZATION = ((0.4, 0.5, 0.6), (0.1, 0.2, 0.3))


def make(transform=CropFlip, records=RECORDS, seed=0, **options):
    return ImageDataset(records, transform(size=8, crop_fraction=1.0), NORMALIZATION, seed, **options)


def test_pixels_are_normalized_per_channel():
    image, target, index = ImageDataset(RECORDS, lambda image: image, NORMALIZATION)[3]
    expected = (PIXELS[3] / 255 - NORMALIZATION[0]) / NORMALIZATION[1]
    assert np.allclose(image.permute(1, 2, 0), expected, atol=1e-5)
    assert (target, index) == (1, 13)


def test_chance_depends_on_seed_epoch_and_index_alone():
    data = make()
    first = [data[0, n][0] for n in range(6)]
    torch.manual_seed(99)
    backwards = [data[0, n][0] for n in reversed(range(6))][::-1]
    alone = make(records=[RECORDS[4]])[0, 0][0]
    assert all(torch.equal(a, b) for a, b in zip(first, backwards, strict=True))
    assert torch.equal(first[4], alone)


@pytest.mark.parametrize("other", [lambda: make()[1, 2][0], lambda: make(seed=1)[0, 2][0]])
def test_epochs_and_seeds_draw_differently(other):
    assert not torch.equal(make()[0, 2][0], other())


def test_samples_draw_differently_in_one_epoch():
    same = [Record(RECORDS[0].images, 0, 0, index) for index in range(2)]
    data = make(records=same)
    assert not torch.equal(data[0, 0][0], data[0, 1][0])


def test_rounds_of_an_epoch_draw_differently():
    data = make()
    drawn = [data[key][0] for key in ((0, 2), (0, 2, 0), (0, 2, 1), (1, 2, 0))]
    assert len(torch.stack(drawn).flatten(1).unique(dim=0)) == 4
    assert torch.equal(data[0, 2, 1][0], drawn[2])


def test_the_views_of_a_sample_are_normalized_each():
    data = ImageDataset(RECORDS, lambda image: (image, image.rotate(90)), NORMALIZATION)
    plain = ImageDataset(RECORDS, lambda image: image, NORMALIZATION)
    views, target, index = data[3]
    assert isinstance(views, tuple)
    assert torch.equal(views[0], plain[3][0])
    assert torch.equal(views[1], plain[3][0].rot90(dims=(1, 2)))
    assert (target, index) == (1, 13)


def test_views_are_stacked_each():
    data = ImageDataset(RECORDS, lambda image: (image, image.rotate(90)), NORMALIZATION)
    batch = Collate(9, views=2)([data[1], data[4]])
    assert [torch.equal(batch.input[k], torch.stack([data[1][0][k], data[4][0][k]])) for k in (0, 1)] == [True, True]
    assert (batch.target.tolist(), batch.index.tolist()) == ([1, 0], [11, 14])


@pytest.mark.parametrize("views", [0, 2])
def test_a_batch_without_rows_has_as_many_views(views):
    batch = Collate(9, views)([])
    inputs = batch.input if views else (batch.input,)
    assert [view.shape for view in inputs] == [(0, 3, 9, 9)] * max(views, 1)
    assert batch.target.dtype == batch.index.dtype == torch.int64


def test_the_global_generator_is_left_alone():
    torch.manual_seed(3)
    expected = torch.rand(2)
    torch.manual_seed(3)
    make()[0, 0]
    assert torch.equal(torch.rand(2), expected)


def test_cached_images_are_read_once(monkeypatch):
    data = make(NoAugmentation, cache=True)
    first = data[2][0]
    monkeypatch.setattr(ArrayImages, "read", lambda *_: pytest.fail("read again"))
    assert torch.equal(data[2][0], first)


def damage(path, kind):
    if kind == "text":
        path.write_text("this is not an image")
    elif kind == "empty":
        path.write_bytes(b"")
    else:
        pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, format=kind)
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def bad_data(folder, kind):
    damage(folder / "bad.jpg", kind)
    return make(records=[Record(FileImages(folder, ["bad.jpg"]), 0, 0, 41)])


@pytest.mark.parametrize("kind", ["jpeg", "png", "gif", "text", "empty"])
def test_a_damaged_image_is_named_with_its_index(tmp_path, kind):
    with pytest.raises(CorruptImageError, match=rf"{tmp_path}/bad.jpg \(sample index 41\) cannot be read as an image"):
        bad_data(tmp_path, kind)[0]


def test_a_worker_process_passes_the_message_on(tmp_path):
    batches = iter(DataLoader(bad_data(tmp_path, "jpeg"), num_workers=1))
    with pytest.raises(CorruptImageError, match=r"bad.jpg \(sample index 41\)"):
        next(batches)
    batches._shutdown_workers()  # collected later, as part of the traceback, it would wait for five seconds


def test_a_vanished_file_is_named(tmp_path):
    data = make(records=[Record(FileImages(tmp_path, ["gone.jpg"]), 0, 0, 7)])
    with pytest.raises(CorruptImageError, match=r"gone.jpg \(sample index 7\).*No such file"):
        data[0]
