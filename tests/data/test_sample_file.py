import json

import pandas as pd
import pytest
import torch

from lqf_lightning.data.manifest import Manifest
from lqf_lightning.data.sample_file import read_subset, read_weights
from lqf_lightning.data.world import World

PATHS = ["a/0", "a/1", "b/0", "b/1", "v/0", "u/0"]
SPLITS = ["train", "train", "train", "train", "val", "unlabeled"]
LABELS = [0, 0, 1, 1, 0, -1]


@pytest.fixture
def manifest():
    return Manifest.build(zip(SPLITS, PATHS, LABELS, strict=True), ["ant", "bee"])


def write(folder, name, **columns):
    """A file in the form that its name ends in."""
    path, table = folder / name, pd.DataFrame(columns)
    writers = {".parquet": table.to_parquet, ".csv": lambda p: table.to_csv(p, index=False), ".json": table.to_json}
    writers[path.suffix](path)
    return path


@pytest.mark.parametrize("columns", [{"index": [3, 0]}, {"path": ["b/1", "a/0"]}], ids=["index", "path"])
@pytest.mark.parametrize("form", ["parquet", "csv", "json"])
def test_a_table_names_samples_by_index_or_path(columns, form, tmp_path, manifest):
    assert read_subset(write(tmp_path, f"some.{form}", **columns), manifest).tolist() == [0, 3]


@pytest.mark.parametrize("text", ["3\n0\n", "b/1\n\na/0", json.dumps([3, 0]), json.dumps(["b/1", "a/0"])])
def test_a_plain_list_will_do(text, tmp_path, manifest):
    path = tmp_path / ("some.json" if text.startswith("[") else "some.txt")
    path.write_text(text)
    assert read_subset(path, manifest).tolist() == [0, 3]


@pytest.mark.parametrize("form", ["parquet", "csv", "json"])
def test_weights_are_one_where_the_file_says_nothing(form, tmp_path, manifest):
    path = write(tmp_path, f"some.{form}", index=[2, 0], weight=[0.0, 2.5])
    assert torch.equal(read_weights(path, manifest), torch.tensor([2.5, 1, 0, 1, 1, 1], dtype=torch.float64))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"index": []}, "names no sample"),
        ({"index": [0, 4]}, "1 of 2 entries are no training samples; the first is index 4"),
        ({"index": [5]}, "the first is index 5"),  # no label: nothing to choose by
        ({"index": [0, 99]}, "first is index 99.*4 that the manifest lists"),
        ({"index": [0.5]}, "first is index 0.5"),
        ({"index": [-1]}, "first is index -1"),
        ({"path": ["a/0", "x"]}, "first is path x"),
        ({"index": [1, 2, 1]}, "index 1 is named more than once"),
        ({"number": [1]}, r"columns \['number'\], expected index"),
        ({"index": [1], "score": [0.1]}, r"columns \['index', 'score'\].*no others"),
        ({"index": [0, 1], "path": ["a/0", "b/0"]}, "1 of 2 indices belong to other paths; the first is 1, b/0 there"),
    ],
)
def test_files_that_cannot_be_meant_are_refused_with_what_they_hold(columns, message, tmp_path, manifest):
    with pytest.raises(ValueError, match=rf"data\.subset=.*some\.csv.*{message}"):
        read_subset(write(tmp_path, "some.csv", **columns), manifest)


@pytest.mark.parametrize(
    ("weight", "message"),
    [
        ([1, float("nan")], "1 weights are not finite numbers.*nan of index 1"),
        ([1, -0.5], "-0.5 of index 1"),
        ([float("inf"), 1], "inf of index 0"),
        (["many", 1], "many of index 0"),
        ([0, 0], "all training samples of ant have weight 0"),
    ],
)
def test_weights_that_are_none_are_refused(weight, message, tmp_path, manifest):
    with pytest.raises(ValueError, match=rf"data\.weights=.*{message}"):
        read_weights(write(tmp_path, "some.csv", index=[0, 1], weight=weight), manifest)


def test_weights_need_their_column_and_a_table(tmp_path, manifest):
    with pytest.raises(ValueError, match=r"columns \['index'\], expected index .* and weight"):
        read_weights(write(tmp_path, "some.csv", index=[1]), manifest)
    (tmp_path / "some.txt").write_text("1")
    with pytest.raises(ValueError, match=r"got a \.txt file, expected one of \['\.parquet', '\.csv', '\.json'\]"):
        read_weights(tmp_path / "some.txt", manifest)


def test_a_missing_or_broken_file_is_named(tmp_path, manifest):
    with pytest.raises(FileNotFoundError, match=r"data\.subset=.*none\.csv.*Set data\.subset=null"):
        read_subset(tmp_path / "none.csv", manifest)
    (tmp_path / "some.json").write_text("{")
    with pytest.raises(ValueError, match="cannot be read as json"):
        read_subset(tmp_path / "some.json", manifest)
    (tmp_path / "some.parquet").write_text("no")
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_subset(tmp_path / "some.parquet", manifest)


def test_a_subset_keeps_indices_and_leaves_other_splits_alone(make_module, tmp_path):
    everything = make_module().manifest
    chosen = everything.rows("train")["index"].tolist()[::2]
    some = make_module(subset=write(tmp_path, "some.csv", index=chosen[::-1])).manifest
    assert some.rows("train")["index"].tolist() == chosen
    assert some.table.drop(columns="used").equals(everything.table.drop(columns="used"))
    for split in ("val", "test"):
        assert some.rows(split).equals(everything.rows(split))


@pytest.mark.parametrize("options", [{"shots": 2}, {"subset_ratio": 0.5}])
def test_samples_are_chosen_in_one_way(options, make_module, tmp_path):
    path = write(tmp_path, "some.csv", index=[1])
    with pytest.raises(ValueError, match=r"set data\.subset=null"):
        make_module(subset=path, **options)


def test_a_subset_without_a_class_is_refused(make_module, tmp_path):
    chosen = make_module().manifest.rows("train")
    path = write(tmp_path, "some.csv", index=chosen.loc[chosen["class"] != "bee", "index"])
    with pytest.raises(ValueError, match=r"1 of 3 classes: bee.*Add images of every class to data\.subset="):
        make_module(subset=path)


def test_a_subset_outlives_its_images(make_module, split_folder, tmp_path, caplog):
    first = make_module()
    first.manifest.write(tmp_path / "manifest.parquet")
    chosen = first.manifest.rows("train").groupby("class").head(3)
    path = write(tmp_path, "some.csv", index=chosen["index"], path=chosen["path"])
    (split_folder / chosen["path"].iloc[0]).unlink()
    again = make_module(subset=path, manifest=tmp_path / "manifest.parquet").manifest
    assert again.rows("train")["index"].tolist() == chosen["index"].tolist()[1:]
    assert "1 images of data.subset" in caplog.text


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_training_sample_can_be_looked_at_once(world_size, make_module, tmp_path, monkeypatch):
    everything = make_module().manifest.rows("train")["index"].tolist()
    path = write(tmp_path, "some.csv", index=everything[3:])
    data = make_module(subset=path, label_fraction=0.5, eval_batch_size=4)
    labeled = data.manifest.table["labeled"].to_numpy()
    seen, used = [], []
    for rank in range(world_size):
        monkeypatch.setattr(World, "find", classmethod(lambda cls, _, rank=rank: cls(rank, world_size, world_size)))
        seen += [i for batch in data.every_train_dataloader() for i in batch.index.tolist()]
        used += [i for batch in data.fixed_train_dataloader() for i in batch.index.tolist()]
    assert sorted(used) == [i for i in everything[3:] if labeled[i]]
    assert sorted(seen) == [i for i in everything if labeled[i]]
    assert len(seen) > len(used)


def test_weights_reach_the_data_module(make_module, tmp_path):
    plain = make_module()
    index = int(plain.manifest.rows("train")["index"].iloc[5])
    data = make_module(weights=write(tmp_path, "some.csv", index=[index], weight=[3.0]))
    assert plain.sample_weights is None
    assert data.sample_weights.shape == (len(data.manifest),)
    assert data.sample_weights.nonzero().numel() == len(data.manifest)
    assert (data.sample_weights != 1).nonzero().flatten().tolist() == [index]
    outside = write(tmp_path, "other.csv", index=plain.manifest.rows("val")["index"][:1], weight=[3.0])
    with pytest.raises(ValueError, match="no training samples"):
        make_module(weights=outside)
