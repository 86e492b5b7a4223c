from collections import Counter
from itertools import chain

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from lqf_lightning.data import CropFlip, FolderSource, ImageDataModule, Stream, TwoViews, WeakStrong
from lqf_lightning.data.dataset import CorruptImageError
from lqf_lightning.data.world import World

QUIET = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "accelerator": "cpu"}
HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
ALL = Stream("all", TwoViews)
BOTH = Stream("both", WeakStrong, 2)


@pytest.fixture
def make(add_images, split_folder):
    """27 training images with a label, of which 6 may be used, and 5 that have none."""
    add_images(split_folder / "unlabeled", 5, seed=7)

    def build(stream, **options):
        options = {"labels_per_class": 2, "batch_size": 6, "image_size": 8, "num_workers": 0, **options}
        options = {"augmentation": CropFlip, **options}
        data = ImageDataModule(FolderSource(split_folder), **options)
        data.setup()
        data.normalization, data.stream = HALF, stream
        return data

    return build


def on_rank(monkeypatch, rank, size):
    monkeypatch.setattr(World, "find", classmethod(lambda cls, trainer: cls(rank, size, size)))


def epoch_of(data, epoch=0):
    loader = data.train_dataloader()
    for part in getattr(loader, "flattened", [loader]):
        part.order.set_epoch(epoch)
    if data.stream.samples == "both":
        return [step for step, _, _ in loader]
    return list(loader)


def contents(*batches):
    """Index, target and pixels of every sample, in an order that tells nothing."""
    rows = []
    for batch in batches:
        views = batch.input if isinstance(batch.input, tuple) else (batch.input,)
        sums = zip(*(view.double().flatten(1).sum(1).tolist() for view in views), strict=True)
        rows += zip(batch.index.tolist(), batch.target.tolist(), sums, strict=True)
    return sorted(rows)


def test_all_samples_come_once_with_the_labels_that_may_be_used(make):
    data = make(ALL)
    steps = epoch_of(data)
    index, target = (torch.cat([batch[k] for batch in steps]).tolist() for k in (2, 1))
    assert [len(batch.index) for batch in steps] == [6] * 5  # of 32 samples
    assert len(set(index)) == 30
    table = data.manifest.table
    assert set(index) < set(data.manifest.training_rows()["index"])
    assert target == [table["label"][i] if table["labeled"][i] else -1 for i in index]
    assert 4 <= sum(label >= 0 for label in target) <= 6
    assert {table["split"][i] for i in index} == {"train", "unlabeled"}


def test_views_are_tuples_of_normalized_images(make):
    first = epoch_of(make(ALL))[0].input
    assert isinstance(first, tuple)
    assert [(view.shape, view.dtype) for view in first] == [((6, 3, 8, 8), torch.float32)] * 2
    assert all(-1 <= view.min() < 0 < view.max() <= 1 for view in first)
    differ = (first[0] != first[1]).flatten(1).float().mean(1)
    assert (differ > 0.5).all()


def test_views_depend_on_seed_epoch_and_index_alone(make):
    again = [contents(*epoch_of(make(ALL, num_workers=workers), epoch)) for workers, epoch in ((0, 1), (2, 1), (0, 2))]
    assert again[0] == again[1]
    drawn = [{index: sums for index, _, sums in each} for each in (again[0], again[2])]
    assert all(drawn[0][index] != drawn[1][index] for index in drawn[0].keys() & drawn[1].keys())


def test_labeled_samples_repeat_beside_a_pass_over_all_without_labels(make):
    data = make(BOTH)
    steps = epoch_of(data)
    train = data.manifest.rows("train")
    labels = dict(zip(train["index"], train["label"], strict=True))
    assert len(labels) == 6
    assert len(steps) == 2  # 24 of 32 samples
    assert all(set(step) == {"labeled", "unlabeled"} for step in steps)
    for step in steps:
        assert sorted(step["labeled"].index.tolist()) == sorted(labels)  # a step is as large as the set
        assert step["labeled"].target.tolist() == [labels[i] for i in step["labeled"].index.tolist()]
        assert step["labeled"].input.shape == (6, 3, 8, 8)
        assert [view.shape for view in step["unlabeled"].input] == [(12, 3, 8, 8)] * 2
    unlabeled = torch.cat([step["unlabeled"].index for step in steps]).tolist()
    assert len(set(unlabeled)) == 24
    assert set(unlabeled) <= set(data.manifest.training_rows()["index"])


@pytest.mark.parametrize("options", [{}, {"label_noise": 0.5}, {"labels_per_class": None}])
def test_hidden_labels_never_leak(make, options):
    data = make(BOTH, **options)
    for epoch in range(3):
        for step in epoch_of(data, epoch):
            assert (step["unlabeled"].target == -1).all()
            assert (step["labeled"].target >= 0).all()
    hidden = set(data.manifest.table.query("not labeled")["index"])
    data.stream = ALL
    for batch in epoch_of(data):
        assert all((t == -1) == (i in hidden) for i, t in zip(batch.index.tolist(), batch.target.tolist(), strict=True))


def test_batches_larger_than_the_labeled_set_repeat_samples_with_new_pixels(make):
    (step,) = epoch_of(make(Stream("both", WeakStrong, 1), labels_per_class=1, batch_size=27))
    index, images = step["labeled"].index, step["labeled"].input
    assert set(Counter(index.tolist()).values()) == {9}
    for one in index.unique():
        assert len(images[index == one].flatten(1).unique(dim=0)) > 6  # the images are small
    assert len(step["unlabeled"].index.unique()) == 27


def test_the_two_streams_are_drawn_independently(make):
    data = make(Stream("both", WeakStrong, 1), labels_per_class=None, batch_size=27)
    (step,) = epoch_of(data)
    assert step["labeled"].index.tolist() != step["unlabeled"].index.tolist()
    weak = dict(zip(step["unlabeled"].index.tolist(), step["unlabeled"].input[0], strict=True))
    for index, image in zip(step["labeled"].index.tolist(), step["labeled"].input, strict=True):
        assert index not in weak or not torch.equal(weak[index], image)


@pytest.mark.parametrize("world_size", [2, 3])
@pytest.mark.parametrize("stream", [ALL, BOTH], ids=["all", "both"])
def test_processes_together_see_what_one_sees(make, monkeypatch, stream, world_size):
    def together(ranks):
        shares = []
        for rank in range(ranks):
            on_rank(monkeypatch, rank, ranks)
            shares.append(epoch_of(make(stream), 1))
        for step in zip(*shares, strict=True):
            parts = ("labeled", "unlabeled") if stream is BOTH else ()
            yield [contents(*(share[part] for share in step)) for part in parts] or contents(*step)

    assert list(together(world_size)) == list(together(1))


class Recorder(LightningModule):
    """Trains one number and writes down every training batch."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        batches = list(batch.values()) if isinstance(batch, dict) else [batch]
        order = [each.index.tolist() for each in batches]
        self.seen.append((self.current_epoch, batch_idx, order, [contents(each) for each in batches]))
        return self.weight * batches[-1].input[0].mean()

    def validation_step(self, batch, batch_idx):
        pass

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Note(Recorder):
    """Leaves what a process saw in a file, because forked ones keep nothing."""

    def __init__(self, folder):
        super().__init__()
        self.folder = folder

    def on_train_end(self):
        torch.save(self.seen, self.folder / f"{self.trainer.world_size}-{self.global_rank}.pt")


def test_every_step_of_several_processes_is_that_of_one(make, tmp_path):
    steps = []
    for devices in (1, 2, 3):
        strategy = {"strategy": "ddp_fork"} if devices > 1 else {}
        options = {"use_distributed_sampler": False, "enable_checkpointing": False, **strategy, **QUIET}
        Trainer(max_epochs=2, devices=devices, **options).fit(Note(tmp_path), datamodule=make(BOTH))
        seen = [torch.load(tmp_path / f"{devices}-{rank}.pt") for rank in range(devices)]
        steps.append([])
        for shares in zip(*seen, strict=True):
            labeled, unlabeled = zip(*(samples for *_, samples in shares), strict=True)
            steps[-1].append((shares[0][:2], sorted(chain(*labeled)), sorted(chain(*unlabeled))))
    assert len(steps[0]) == 4
    assert steps[0] == steps[1] == steps[2]


def fit(data, folder, step, resume=None):
    module = Recorder()
    checkpoints = ModelCheckpoint(folder, "{step}", save_top_k=-1, every_n_train_steps=step)
    trainer = Trainer(max_epochs=3, callbacks=checkpoints, use_distributed_sampler=False, **QUIET)
    trainer.fit(module, datamodule=data, ckpt_path=resume, weights_only=True)
    return module.seen


@pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("samples", ["all", "both"])
@pytest.mark.parametrize("step", [5, 7])  # 5 steps an epoch: at its end and within the next
def test_a_resumed_run_sees_what_an_uninterrupted_one_sees(make, tmp_path, samples, workers, step):
    stream, options = Stream(samples, TwoViews, 1), {"num_workers": workers, "labels_per_class": 3}
    whole = fit(make(stream, **options), tmp_path / "ckpt", step)
    assert [(epoch, batch) for epoch, batch, *_ in whole] == [(e, b) for e in range(3) for b in range(5)]
    assert len({str(order) for _, _, order, _ in whole}) == 15
    checkpoint = tmp_path / "ckpt" / f"step={step}.ckpt"
    assert fit(make(stream, **options), tmp_path / "ckpt", step, checkpoint) == whole[step:]


@pytest.mark.parametrize(
    ("stream", "options", "message"),
    [
        (ALL, {"batch_size": 33}, r"32 training images.*fewer than data\.batch_size=33; set data\.batch_size=32 or"),
        (BOTH, {"batch_size": 17}, r"method\.unlabeled_ratio=2 times data\.batch_size=17; set data\.batch_size=16 or "
                                   r"lower or method\.unlabeled_ratio=1"),
        (Stream("both", WeakStrong, 40), {"batch_size": 8}, r"40 times .*batch_size=8; set method\.unlabeled_ratio=4"),
    ],
)  # fmt: skip
def test_too_few_images_for_a_step_are_refused(make, stream, options, message):
    with pytest.raises(ValueError, match=message):
        make(stream, **options).train_dataloader()


@pytest.mark.parametrize("stream", [ALL, BOTH], ids=["all", "both"])
def test_a_batch_that_cannot_be_shared_is_refused(make, monkeypatch, stream):
    on_rank(monkeypatch, 3, 4)
    with pytest.raises(ValueError, match=r"data\.batch_size=6 .*set data\.batch_size=4 or 8"):
        make(stream).train_dataloader()


def test_ordinary_training_and_evaluation_know_labeled_images_alone(make):
    data = make(Stream())
    expected = data.manifest.rows("train")["index"].tolist()
    assert len(expected) == 6
    fixed = torch.cat([batch.index for batch in data.fixed_train_dataloader()]).tolist()
    assert fixed == sorted(torch.cat([batch.index for batch in data.train_dataloader()]).tolist()) == expected
    data.sweeps = 2
    assert torch.cat([batch.index for batch in data.train_dataloader()]).tolist() == expected * 2
    data.stream = ALL
    assert torch.cat([batch.index for batch in data.fixed_train_dataloader()]).tolist() == expected


def test_labeled_samples_may_have_views_too(make):
    data = make(Stream("labeled", TwoViews))
    (batch,) = epoch_of(data)
    assert [view.shape for view in batch.input] == [(6, 3, 8, 8)] * 2
    assert (batch.target >= 0).all()


def test_a_damaged_image_without_a_label_is_named(make, split_folder):
    (split_folder / "unlabeled" / "003.png").write_text("not an image")
    data = make(ALL, batch_size=32)
    with pytest.raises(CorruptImageError, match=r"unlabeled/003\.png \(sample index 46\) cannot be read"):
        epoch_of(data)
    data.stream = Stream()
    epoch_of(data)  # nobody looks at it


@pytest.mark.parametrize("augmentation", [CropFlip, None])
def test_without_views_all_samples_are_augmented_as_for_ordinary_training(make, augmentation):
    data = make(Stream("all"), augmentation=augmentation, labels_per_class=None)
    drawn = contents(*epoch_of(data, 1))
    assert len(drawn) == 30
    data.stream = Stream()
    ordinary = contents(*epoch_of(data, 1))
    assert len(set(drawn) & set(ordinary)) == sum(target >= 0 for _, target, _ in drawn)
