import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image

from lqf_lightning.data import DigitsSource, FolderSource, ImageDataModule, Manifest
from lqf_lightning.data.tombstone import tombstone_name


def opened(source, manifest=None, **options):
    data = ImageDataModule(source, image_size=8, num_workers=0, manifest=manifest, **options)
    data.setup()
    return data


def trained_on(manifest):
    """What a run learns from: index, path and label."""
    return manifest.rows("train")[["index", "path", "label", "true_label"]].reset_index(drop=True)


def without(rows, gone):
    return rows[~rows["index"].isin(gone)].reset_index(drop=True)


CHOICES = [
    {},
    {"shots": 5},
    {"subset_ratio": 0.5},
    {"label_fraction": 0.5, "label_noise": 0.3},
    {"labels_per_class": 3, "subset_ratio": 0.7},
    {"shots": 6, "label_noise": 0.2, "val_fraction": 0.3},
]


@pytest.mark.parametrize("files", ["there", "gone"])
@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_a_run_goes_on_with_what_it_used_and_nobody_takes_a_place(options, files, split_folder, tmp_path):
    source = FolderSource(split_folder)
    data = opened(source, **options)
    data.manifest.write(tmp_path / "0.parquet")
    held_out = data.manifest.rows("val")["index"].tolist()
    expected = trained_on(data.manifest)
    for request in (1, 2):  # the second opens a run that has forgotten already
        gone = expected["index"].iloc[[0, 2]].tolist()
        paths = expected["path"].iloc[[0, 2]].tolist()
        Manifest.read(tmp_path / f"{request - 1}.parquet").forget(np.array(gone)).write(tmp_path / f"{request}.parquet")
        if files == "gone":
            for path in paths:
                (split_folder / path).unlink()
        again = opened(source, tmp_path / f"{request}.parquet", **options)
        expected = without(expected, gone)
        pd.testing.assert_frame_equal(trained_on(again.manifest), expected)
        assert again.manifest.rows("val")["index"].tolist() == held_out
        assert len(again.manifest) == len(data.manifest)


@pytest.mark.parametrize("options", CHOICES, ids=str)
def test_sets_in_memory_go_on_too(options, tmp_path):
    data = opened(DigitsSource(), **options)
    gone = data.manifest.rows("train")["index"].to_numpy()[[1, 5, 8]]
    data.manifest.forget(gone).write(tmp_path / "m.parquet")
    again = opened(DigitsSource(), tmp_path / "m.parquet", **options)
    pd.testing.assert_frame_equal(trained_on(again.manifest), without(trained_on(data.manifest), gone))
    assert len(again.manifest) == 1797


def test_other_options_choose_afresh_among_those_that_are_left(split_folder, tmp_path):
    data = opened(FolderSource(split_folder), shots=5)
    gone = data.manifest.rows("train")["index"].to_numpy()[[0]]
    data.manifest.forget(gone).write(tmp_path / "m.parquet")
    again = opened(FolderSource(split_folder), tmp_path / "m.parquet", shots=6)
    assert again.manifest.rows("train").groupby("label").size().tolist() == [6, 6, 6]
    assert gone[0] not in set(again.manifest.rows("train")["index"])


@pytest.mark.parametrize("key", ["index", "path", "both"])
def test_a_file_that_chose_or_weighed_the_sample_is_read_as_before(key, split_folder, tmp_path):
    data = opened(FolderSource(split_folder))
    rows = data.manifest.rows("train")[["index", "path"]].iloc[::2]
    rows = rows if key == "both" else rows[[key]]
    rows.to_parquet(tmp_path / "subset.parquet")
    rows.assign(weight=2.0).to_parquet(tmp_path / "weights.parquet")
    options = {"subset": tmp_path / "subset.parquet", "weights": tmp_path / "weights.parquet"}
    data = opened(FolderSource(split_folder), **options)
    gone = data.manifest.rows("train")["index"].to_numpy()[[1, 4]]
    data.manifest.forget(gone).write(tmp_path / "m.parquet")
    again = opened(FolderSource(split_folder), tmp_path / "m.parquet", **options)
    pd.testing.assert_frame_equal(trained_on(again.manifest), without(trained_on(data.manifest), gone))
    left = again.manifest.rows("train")["index"].tolist()
    assert torch.equal(again.sample_weights[left], data.sample_weights[left])


@pytest.mark.parametrize("files", ["there", "gone"])
def test_a_whole_class_may_be_forgotten(files, split_folder, tmp_path):
    data = opened(FolderSource(split_folder), shots=5)
    rows = data.manifest.rows("train")
    gone = rows.loc[rows["class"] == "bee", "index"].to_numpy()
    every = data.manifest.labeled_rows()
    every = every.loc[every["class"] == "bee", "index"].to_numpy() if files == "gone" else gone
    data.manifest.forget(every).write(tmp_path / "m.parquet")
    if files == "gone":
        for file in (split_folder / "train" / "bee").iterdir():
            file.unlink()
    again = opened(FolderSource(split_folder), tmp_path / "m.parquet", shots=5)
    pd.testing.assert_frame_equal(trained_on(again.manifest), without(trained_on(data.manifest), gone))
    assert again.classes == ["ant", "bee", "cat"]


def test_a_tombstone_says_nothing_but_index_and_split(split_folder, tmp_path):
    data = opened(FolderSource(split_folder), val_fraction=0)
    data.manifest.hash_contents()
    row = data.manifest.table.set_index("path").loc["train/bee/004.png"]
    data.manifest.forget(np.array([row["index"]])).write(tmp_path / "m.parquet")
    content = pq.read_table(tmp_path / "m.parquet").to_pydict()
    values = {str(value) for column in content.values() for value in column}
    assert not {"train/bee/004.png", row["sha"]} & values
    assert b"bee/004" not in (tmp_path / "m.parquet").read_bytes()
    tombstone = Manifest.read(tmp_path / "m.parquet").table.loc[row["index"]]
    assert tombstone.drop(["index", "path", "split"]).to_dict() == {
        "label": -1, "class": "", "true_label": -1, "sha": "", "used": False, "removed": True, "labeled": False,
        "core": "",
    }  # fmt: skip


def test_the_place_of_a_forgotten_file_stays_empty_whatever_lies_there(split_folder, tmp_path):
    data = opened(FolderSource(split_folder))
    index = data.manifest.table.set_index("path").loc["train/bee/004.png", "index"]
    data.manifest.forget(np.array([index])).write(tmp_path / "m.parquet")
    Image.new("RGB", (5, 5)).save(split_folder / "train" / "bee" / "004.png")
    again = opened(FolderSource(split_folder), tmp_path / "m.parquet").manifest
    assert len(again) == len(data.manifest)
    assert "train/bee/004.png" not in set(again.table["path"])


def test_new_files_join_a_run_that_used_everything_only(split_folder, tmp_path):
    for options, joins in (({}, True), ({"shots": 5}, False)):
        data = opened(FolderSource(split_folder), **options)
        data.manifest.forget(data.manifest.rows("train")["index"].to_numpy()[[0]]).write(tmp_path / "m.parquet")
        new = split_folder / "train" / "cat" / "new.png"
        Image.new("RGB", (5, 5), "red").save(new)
        again = opened(FolderSource(split_folder), tmp_path / "m.parquet", **options).manifest
        assert ("train/cat/new.png" in set(again.rows("train")["path"])) == joins
        new.unlink()


def test_requests_one_by_one_leave_what_a_joint_request_leaves(split_folder):
    manifest = opened(FolderSource(split_folder)).manifest
    one, both = manifest.forget(np.array([3])).forget(np.array([3, 9])), manifest.forget(np.array([3, 9]))
    pd.testing.assert_frame_equal(one.table, both.table)
    assert one.key == both.key


def test_names_depend_on_the_key():
    assert tombstone_name("a", "00") == tombstone_name("a", "00")
    assert len({tombstone_name("a", "00"), tombstone_name("a", "01"), tombstone_name("b", "00")}) == 3


def test_an_index_outside_the_manifest_is_refused(split_folder):
    with pytest.raises(IndexError, match="indices from 3 to 99, expected 0 to 42"):
        opened(FolderSource(split_folder)).manifest.forget(np.array([3, 99]))


def seen(loader):
    return [int(index) for batch in loader for index in batch.index]


def test_loaders_of_a_set_in_use_are_without_forgotten_samples(make_module):
    data = make_module()
    every = seen(data.fixed_train_dataloader())
    data.forget(torch.tensor(every[:2]))
    assert seen(data.fixed_train_dataloader()) == every[2:]
    assert sorted(seen(data.train_dataloader())) == every[2:]
    assert seen(data.val_dataloader()) == seen(make_module().val_dataloader())
    with pytest.raises(ValueError, match="1 of 2 indices belong to no labeled training sample"):
        data.chosen_dataloader(torch.tensor(every[1:3]))


def test_chosen_samples_come_as_they_are_evaluated(make_module):
    data = make_module()
    batches = list(data.fixed_train_dataloader())
    pictures = {int(i): x for batch in batches for i, x in zip(batch.index, batch.input, strict=True)}
    chosen = sorted(pictures)[3:20:4]
    for batch in data.chosen_dataloader(torch.tensor(chosen[::-1])):
        assert all(torch.equal(x, pictures[int(i)]) for i, x in zip(batch.index, batch.input, strict=True))
    assert seen(data.chosen_dataloader(torch.tensor(chosen[::-1]))) == chosen
