import numpy as np
import pytest
import torch

from lqf_lightning.data import UNLABELED, FolderSource, ImageDataModule
from lqf_lightning.data.source import Samples
from lqf_lightning.data.unlabeled_images import UnlabeledImages


class Relabeled(FolderSource):
    """The same images, with labels that belong to others."""

    def load(self):
        splits = super().load()
        train = splits["train"]
        labels = np.random.default_rng(0).permutation(train.labels).tolist()
        return splits | {"train": Samples(train.images, train.paths, labels, train.classes)}


def images(root, source=FolderSource, **options):
    data = ImageDataModule(source(root), image_size=32, batch_size=6, num_workers=0, val_fraction=0.0)
    data.setup()
    data.normalization = ((0.5,) * 3, (0.25,) * 3)
    return UnlabeledImages(data, **options)


def indices(loader):
    return torch.cat([batch.index for batch in loader]).tolist()


def test_held_out_images_and_the_others_are_all_of_the_training_split(folder_of_shapes):
    unlabeled = images(folder_of_shapes, held_out=0.25)
    held_out, train = (indices(loader) for loader in (unlabeled.val_dataloader(), unlabeled.train_dataloader()))
    assert (len(held_out), len(train)) == (6, 18)
    assert sorted(held_out + train) == unlabeled.data.manifest.rows("train")["index"].tolist()


def test_two_images_at_least_are_held_out_since_one_has_no_spread(folder_of_shapes):
    assert len(images(folder_of_shapes, held_out=0.01).held_out) == 2


def test_no_label_is_told_and_none_has_a_say(folder_of_shapes):
    plain, other = images(folder_of_shapes), images(folder_of_shapes, Relabeled)
    assert plain.data.manifest.table["label"].tolist() != other.data.manifest.table["label"].tolist()
    for name in ("train_dataloader", "val_dataloader", "statistics_dataloader"):
        for first, second in zip(getattr(plain, name)(), getattr(other, name)(), strict=True):
            assert (first.target == UNLABELED).all()
            assert torch.equal(first.input, second.input)
            assert torch.equal(first.index, second.index)


def test_statistics_are_of_a_fair_sample_of_what_is_trained_on(folder_of_shapes):
    unlabeled = images(folder_of_shapes, statistics=13)
    found = indices(unlabeled.statistics_dataloader())
    assert len(found) == 12  # full batches of 6
    assert set(found) <= set(indices(unlabeled.train_dataloader()) + [r.index for r in unlabeled.train])
    assert not set(found) & set(indices(unlabeled.val_dataloader()))
    labels = unlabeled.data.manifest.table["label"][found]
    assert labels.nunique() == 3  # not the first class alone


@pytest.mark.parametrize(
    ("options", "complaint"),
    [
        ({"held_out": 0.0}, r"above 0 and below 1, got 0\.0\. Set images\.held_out=0\.1"),
        ({"held_out": 0.99}, r"leave 0 to train on\. Set images\.held_out lower"),
        ({"statistics": 1}, r"at least 2, got 1\. Set images\.statistics=1024"),
    ],
)
def test_shares_that_leave_nothing_are_refused(folder_of_shapes, options, complaint):
    with pytest.raises(ValueError, match=complaint):
        images(folder_of_shapes, **options)
