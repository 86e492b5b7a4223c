from hashlib import blake2b

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from PIL import Image

from lqf_lightning.data import DigitsSource, FolderSource, ImageDataModule, Manifest


def manifest_of(root, **options):
    data = ImageDataModule(FolderSource(root), **options)
    data.setup()
    return data.manifest


def written(root, path, **options):
    manifest_of(root, **options).write(path)
    return Manifest.read(path)


def by_path(manifest):
    return manifest.table.set_index("path")


def test_a_manifest_survives_writing_and_reading(split_folder, tmp_path):
    manifest = manifest_of(split_folder, label_noise=0.2, shots=5)
    manifest.write(tmp_path / "runs" / "manifest.parquet")
    read = Manifest.read(tmp_path / "runs" / "manifest.parquet")
    pd.testing.assert_frame_equal(read.table, manifest.table)
    assert read.classes == manifest.classes == ["ant", "bee", "cat"]


def test_the_row_number_is_the_index_in_all_splits(split_folder):
    table = manifest_of(split_folder).table
    assert (table["index"] == np.arange(43)).all()
    assert table["split"].value_counts().to_dict() == {"train": 27, "val": 3, "test": 13}


def test_hashes_are_those_of_the_files(split_folder, tmp_path):
    table = written(split_folder, tmp_path / "m.parquet").table
    for row in table.itertuples():
        assert row.sha == blake2b((split_folder / row.path).read_bytes(), digest_size=20).hexdigest()


def test_samples_in_memory_are_hashed_by_their_pixels(tmp_path):
    data = ImageDataModule(DigitsSource())
    data.setup()
    data.manifest.write(tmp_path / "m.parquet")
    assert data.manifest.table["sha"].str.len().eq(40).all()
    assert data.manifest.table["sha"].nunique() > 1700


def test_deleted_files_leave_tombstones_and_new_files_follow(split_folder, tmp_path):
    options = {"label_noise": 0.3, "val_fraction": 0.3}
    before = written(split_folder, tmp_path / "m.parquet", **options)
    gone = before.rows("train")["path"].iloc[3]
    (split_folder / gone).unlink()
    Image.new("RGB", (5, 5), "red").save(split_folder / "train" / "ant" / "!first.png")
    after = manifest_of(split_folder, manifest=tmp_path / "m.parquet", **options)
    old, new = by_path(before), by_path(after)
    kept = old.index.drop(gone)
    pd.testing.assert_frame_equal(new.loc[kept], old.loc[kept])
    assert new.loc[gone, "removed"]
    assert new.loc[gone, "index"] == old.loc[gone, "index"]
    assert gone not in set(after.rows("train")["path"])
    assert new.loc["train/ant/!first.png", "index"] == len(before)


def test_the_index_of_a_deleted_file_is_never_given_again(split_folder, tmp_path):
    paths = [tmp_path / f"{n}.parquet" for n in range(3)]
    written(split_folder, paths[0])
    (split_folder / "test" / "cat" / "003.png").unlink()  # the last row
    written(split_folder, paths[1], manifest=paths[0])
    Image.new("RGB", (5, 5), "red").save(split_folder / "test" / "cat" / "new.png")
    table = by_path(written(split_folder, paths[2], manifest=paths[1]))
    assert table.loc["test/cat/003.png", "index"] == 42
    assert table.loc["test/cat/003.png", "removed"]
    assert table.loc["test/cat/new.png", "index"] == 43


def test_a_file_that_comes_back_gets_its_index_back(split_folder, tmp_path):
    first, second = tmp_path / "1.parquet", tmp_path / "2.parquet"
    before = written(split_folder, first)
    path = split_folder / "train" / "bee" / "004.png"
    content = path.read_bytes()
    path.unlink()
    written(split_folder, second, manifest=first)
    path.write_bytes(content)
    after = manifest_of(split_folder, manifest=second)
    pd.testing.assert_frame_equal(after.table, before.table)


def test_without_a_manifest_the_split_of_the_others_survives_a_deletion(split_folder):
    before = by_path(manifest_of(split_folder, val_fraction=0.3))
    gone = before.index[before["split"] == "train"][2]
    (split_folder / gone).unlink()
    after = by_path(manifest_of(split_folder, val_fraction=0.3))
    assert (after["split"] == before.loc[after.index, "split"]).all()


def test_changed_files_are_named(split_folder, tmp_path):
    written(split_folder, tmp_path / "m.parquet")
    Image.new("RGB", (5, 5)).save(split_folder / "train" / "bee" / "004.png")
    with pytest.raises(ValueError, match=r"1 files are not what they were.*train/bee/004\.png.*data\.manifest=null"):
        manifest_of(split_folder, manifest=tmp_path / "m.parquet")


def test_changed_classes_are_refused(split_folder, tmp_path):
    written(split_folder, tmp_path / "m.parquet")
    for split in ("train", "test"):
        (split_folder / split / "bee").rename(split_folder / split / "wasp")
    with pytest.raises(ValueError, match=r"classes have changed.*'bee'.*'wasp'"):
        manifest_of(split_folder, manifest=tmp_path / "m.parquet")


def test_files_that_are_no_manifest_are_refused(split_folder, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"data\.manifest="):
        Manifest.read(tmp_path / "m.parquet")
    pd.DataFrame({"a": [1]}).to_parquet(tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=r"not a manifest: it has the columns \['a'\]"):
        Manifest.read(tmp_path / "m.parquet")


def test_a_manifest_without_images_cannot_invent_hashes(tmp_path):
    manifest = Manifest.build([("train", "a", 0), ("train", "b", 1)], ["a", "b"])
    with pytest.raises(RuntimeError, match="cannot hash"):
        manifest.write(tmp_path / "m.parquet")


def test_a_resumed_run_uses_the_same_labels(split_folder, tmp_path):
    options = {"label_fraction": 0.4, "label_noise": 0.3, "label_seed": 2}
    before = written(split_folder, tmp_path / "m.parquet", **options)
    after = manifest_of(split_folder, manifest=tmp_path / "m.parquet", **options)
    pd.testing.assert_frame_equal(after.table, before.table)
    assert before.rows("train").groupby("true_label").size().tolist() == [4] * 3  # of 9
    fewer = manifest_of(split_folder, manifest=tmp_path / "m.parquet", label_fraction=0.2, label_seed=2)
    assert set(fewer.rows("train")["index"]) < set(before.rows("train")["index"])


def test_manifests_of_earlier_versions_used_every_label(split_folder, tmp_path):
    manifest = written(split_folder, tmp_path / "m.parquet")
    table = pq.read_table(tmp_path / "m.parquet")
    pq.write_table(table.drop_columns("labeled"), tmp_path / "old.parquet")
    read = Manifest.read(tmp_path / "old.parquet")
    pd.testing.assert_frame_equal(read.table, manifest.table)
    resumed = manifest_of(split_folder, manifest=tmp_path / "old.parquet", labels_per_class=2)
    assert len(resumed.rows("train")) == 6


def test_unlabeled_images_are_listed_after_the_others(add_images, split_folder, tmp_path):
    before = written(split_folder, tmp_path / "m.parquet")
    add_images(split_folder / "unlabeled" / "web", 3)
    add_images(split_folder / "unlabeled", 2, seed=9)
    manifest = written(split_folder, tmp_path / "n.parquet", shots=4)
    columns = ["index", "split", "path", "label", "sha"]
    pd.testing.assert_frame_equal(manifest.table[columns][:43], before.table[columns])
    new = manifest.table[43:]
    assert new["path"].tolist() == [
        *(f"unlabeled/00{n}.png" for n in (0, 1)),
        *(f"unlabeled/web/00{n}.png" for n in range(3)),
    ]
    assert set(zip(new["split"], new["label"], new["true_label"], new["class"], new["labeled"], strict=True)) == {
        ("unlabeled", -1, -1, "", False)
    }
    assert new["sha"].str.len().eq(40).all()
    assert new["used"].all()
    assert len(manifest.rows("train")) == 12
    assert len(manifest.rows("unlabeled")) == 0
    assert manifest.training_rows()["index"].tolist() == [*manifest.rows("train")["index"], *range(43, 48)]


def test_unlabeled_images_that_go_and_come_are_numbered_like_others(add_images, split_folder, tmp_path):
    add_images(split_folder / "unlabeled", 3)
    written(split_folder, tmp_path / "m.parquet")
    (split_folder / "unlabeled" / "001.png").unlink()
    Image.new("RGB", (5, 5), "red").save(split_folder / "unlabeled" / "!first.png")
    table = by_path(manifest_of(split_folder, manifest=tmp_path / "m.parquet"))
    assert table.loc[["unlabeled/000.png", "unlabeled/001.png", "unlabeled/!first.png"], "index"].tolist() == [
        43,
        44,
        46,
    ]
    assert table["removed"].sum() == table.loc["unlabeled/001.png", "removed"] == 1
    assert not table[table["split"] == "unlabeled"]["labeled"].any()
