import shutil

import numpy as np
import pytest
import torch

from lqf_lightning.data import CropFlip, DigitsSource, FolderSource, ImageDataModule
from lqf_lightning.data.world import World


def indices(loader):
    return torch.cat([batch.index for batch in loader]).tolist()


def on_rank(monkeypatch, rank, size):
    monkeypatch.setattr(World, "find", classmethod(lambda cls, trainer: cls(rank, size, size)))


def test_batches_hold_what_the_manifest_says(make_module):
    data = make_module(label_noise=0.5)
    table = data.manifest.table
    for split, loader in (("train", data.train_dataloader()), ("val", data.val_dataloader())):
        batches = list(loader)
        index = torch.cat([batch.index for batch in batches])
        assert sorted(index.tolist()) == data.manifest.rows(split)["index"].tolist()
        assert torch.cat([batch.target for batch in batches]).tolist() == table["label"].to_numpy()[index].tolist()
        assert batches[0].input.shape == (len(batches[0].index), 3, 8, 8)
        assert batches[0].input.dtype == torch.float32
        assert batches[0].target.dtype == batches[0].index.dtype == torch.int64


def test_the_pixels_of_a_batch_are_those_of_its_files(make_module):
    data = make_module()
    table = data.manifest.table
    for batch in data.test_dataloader():
        for image, index in zip(batch.input, batch.index.tolist(), strict=True):
            source = data.source.load()["test"]
            picture = source.images.read(source.paths.index(table["path"][index]))
            expected = np.asarray(data.evaluation_transform(picture)) / 255 * 2 - 1
            assert np.allclose(image.permute(1, 2, 0), expected, atol=1e-5)


def test_fixed_training_batches_are_in_manifest_order(make_module):
    data = make_module(augmentation=CropFlip, shots=4)
    assert indices(data.fixed_train_dataloader()) == data.manifest.rows("train")["index"].tolist()
    first = torch.cat([batch.input for batch in data.fixed_train_dataloader()])
    assert torch.equal(first, torch.cat([batch.input for batch in data.fixed_train_dataloader()]))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_sweeps_repeat_the_fixed_training_batches(world_size, make_module, monkeypatch):
    data = make_module(augmentation=CropFlip, shots=4, eval_batch_size=3)
    data.sweeps = 2
    lengths = set()
    for rank in range(world_size):
        on_rank(monkeypatch, rank, world_size)
        fixed, batches = list(data.fixed_train_dataloader()), list(data.train_dataloader())
        for sweep in (batches[: len(batches) // 2], batches[len(batches) // 2 :]):
            assert all(torch.equal(a.input, b.input) for a, b in zip(fixed, sweep, strict=False))
            assert torch.cat([b.index for b in sweep]).tolist() == torch.cat([b.index for b in fixed]).tolist()
        lengths.add(len(batches))
    assert len(lengths) == 1


def test_workers_do_not_change_what_is_drawn(make_module):
    epochs = {}
    for workers in (0, 2):
        loader = make_module(augmentation=CropFlip, num_workers=workers).train_dataloader()
        for epoch in (0, 1):
            loader.order.set_epoch(epoch)
            batches = list(loader)
            index = torch.cat([batch.index for batch in batches])
            epochs[workers, epoch] = torch.cat([batch.input for batch in batches])[index.argsort()]
    assert torch.equal(epochs[0, 0], epochs[2, 0])
    assert torch.equal(epochs[0, 1], epochs[2, 1])
    same = (epochs[2, 0] == epochs[2, 1]).flatten(1).all(1)
    assert not same.any()


@pytest.mark.parametrize("world_size", [2, 3])
def test_processes_together_see_what_one_sees(make_module, monkeypatch, world_size):
    def steps(ranks, loader):
        shares = []
        for rank in range(ranks):
            on_rank(monkeypatch, rank, ranks)
            shares.append(list(loader(make_module(augmentation=CropFlip))))
        for step in zip(*shares, strict=True):
            index, images = torch.cat([b.index for b in step]), torch.cat([b.input for b in step])
            yield index.sort().values, images[index.argsort()]

    train = [list(steps(ranks, lambda data: data.train_dataloader())) for ranks in (1, world_size)]
    assert len(train[0]) == 5
    for one, many in zip(train[0][:4], train[1][:4], strict=True):  # the fifth holds 3 of 27 samples
        assert torch.equal(one[0], many[0])
        assert torch.equal(one[1], many[1])


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
def test_evaluation_shares_cover_every_sample_once(make_module, monkeypatch, world_size):
    for split in ("val", "test"):
        seen = []
        for rank in range(world_size):
            on_rank(monkeypatch, rank, world_size)
            seen += indices(getattr(make_module(batch_size=30), f"{split}_dataloader")())
        assert sorted(seen) == make_module(batch_size=30).manifest.rows(split)["index"].tolist()


def test_an_empty_share_is_a_batch_without_rows(make_module, monkeypatch):
    on_rank(monkeypatch, 4, 5)
    (batch,) = make_module(batch_size=30).val_dataloader()  # 3 samples on 5 processes
    assert batch.input.shape == (0, 3, 8, 8)
    assert batch.target.dtype == batch.index.dtype == torch.int64


def test_no_validation_is_possible(make_module):
    data = make_module(val_fraction=0.0)
    assert len(data.manifest.rows("train")) == 30
    assert data.val_dataloader() == []


def test_without_a_test_split_validation_is_tested(split_folder, make_module):
    shutil.rmtree(split_folder / "test")
    data = make_module()
    assert data.test_split == "val"
    assert indices(data.test_dataloader()) == data.manifest.rows("val")["index"].tolist()


def test_setup_lists_the_samples_once(make_module, monkeypatch):
    data = make_module()
    manifest = data.manifest
    monkeypatch.setattr(FolderSource, "load", lambda self: pytest.fail("listed again"))
    data.setup("fit")
    assert data.manifest is manifest


def test_what_is_asked_too_early_says_what_is_missing():
    data = ImageDataModule(DigitsSource())
    with pytest.raises(RuntimeError, match=r"call setup\(\)"):
        _ = data.classes
    data.setup()
    assert data.num_classes == 10
    with pytest.raises(RuntimeError, match=r"set `normalization`"):
        data.train_dataloader()
    with pytest.raises(ValueError, match="three means and three positive deviations"):
        data.normalization = ((0.5,) * 3, (0.5, 0.0, 0.5))


def test_images_in_memory_need_no_workers():
    assert ImageDataModule(DigitsSource()).num_workers == 0
    assert ImageDataModule(FolderSource("x")).num_workers is None
    assert ImageDataModule(FolderSource("x"), cache_images=True).num_workers == 0


def test_caching_does_not_change_the_batches(make_module):
    cached, plain = make_module(cache_images=True), make_module()
    for _ in range(2):
        for a, b in zip(cached.fixed_train_dataloader(), plain.fixed_train_dataloader(), strict=True):
            assert torch.equal(a.input, b.input)
    assert len(cached.fixed_train_dataloader().dataset.cache) == 27


def test_dropping_the_only_batch_is_refused(make_module):
    assert len(make_module(drop_last=True).train_dataloader()) == 4
    with pytest.raises(ValueError, match=r"27 samples are fewer than data\.batch_size=32; set data\.drop_last=false"):
        make_module(drop_last=True, batch_size=32).train_dataloader()


@pytest.mark.parametrize(
    "options",
    [{"image_size": 0}, {"crop_fraction": 0}, {"crop_fraction": 1.1}, {"batch_size": 0}, {"eval_batch_size": 0},
     {"num_workers": -1}, {"cache_images": True, "num_workers": 2}],
)  # fmt: skip
def test_options_out_of_range_name_their_override(options):
    with pytest.raises(ValueError, match=rf"[sS]et data\.({'|'.join(options)})="):
        ImageDataModule(DigitsSource(), **options)
