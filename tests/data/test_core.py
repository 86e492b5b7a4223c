import logging

import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lqf_lightning.data import FolderSource, ImageDataModule, Manifest

HALF = {"fraction": 0.5, "seed": 0}


def manifest_of(root, **options):
    data = ImageDataModule(FolderSource(root), **{"val_fraction": 0.0, **options})
    data.setup()
    return data.manifest


def paths(manifest, split="train"):
    return set(manifest.rows(split)["path"])


def core_paths(manifest):
    return set(manifest.table.loc[manifest.table["core"] != "", "path"])


def test_the_parts_share_out_the_training_samples_and_nothing_else(split_folder):
    found = {part: manifest_of(split_folder, core=HALF, part=part) for part in ("all", "core", "user")}
    assert paths(found["core"]) == core_paths(found["core"]) == core_paths(found["all"]) == core_paths(found["user"])
    assert paths(found["user"]) == paths(found["all"]) - paths(found["core"])
    assert len(paths(found["all"])) == 30
    assert paths(found["core"], "test") == paths(found["user"], "test") == paths(found["all"], "test")
    for part in ("core", "user"):
        assert found[part].rows("train")["class"].value_counts().to_dict() == {"ant": 5, "bee": 5, "cat": 5}


def test_the_seed_decides_who_is_core(split_folder):
    chosen = [core_paths(manifest_of(split_folder, core={"fraction": 0.3, "seed": s})) for s in (0, 0, 1)]
    assert chosen[0] == chosen[1] != chosen[2]
    assert [len(paths) for paths in chosen] == [9, 9, 9]


@pytest.mark.parametrize("core", [{"classes": ["ant", "cat"]}, "file", "paths"])
def test_classes_files_and_lists_choose_the_core(split_folder, tmp_path, core, caplog):
    wanted = [f"train/{name}/{number:03d}.png" for name in ("ant", "cat") for number in range(10)]
    if core == "file":
        core = str(tmp_path / "core.txt")
        (tmp_path / "core.txt").write_text("\n".join(wanted))
    elif core == "paths":
        core = wanted
    with caplog.at_level(logging.INFO):
        user = manifest_of(split_folder, core=core, part="user")
    assert core_paths(user) == set(wanted)
    assert paths(user) == {f"train/bee/{number:03d}.png" for number in range(10)}
    assert "data.part=user has no images of 2 of 3 classes: ant, cat" in caplog.text


def test_a_class_that_the_options_empty_is_still_refused(split_folder):
    with pytest.raises(ValueError, match="no training images are left with the label of"):
        manifest_of(split_folder, core={"classes": ["ant"]}, part="user", subset_ratio=0.01)


def test_shots_and_ratios_choose_among_the_part(split_folder):
    whole = manifest_of(split_folder, core={"classes": ["ant"]}, part="user")
    few = manifest_of(split_folder, core={"classes": ["ant"]}, part="user", shots=3)
    half = manifest_of(split_folder, core=HALF, part="core", subset_ratio=0.6)
    assert paths(few) < paths(whole)
    assert few.rows("train")["class"].value_counts().to_dict() == {"bee": 3, "cat": 3}
    assert len(paths(half)) == 9
    assert paths(half) < core_paths(half)


def test_the_core_of_an_earlier_run_stands_whatever_came_and_went_since(split_folder, tmp_path):
    first = manifest_of(split_folder, core=HALF, part="core")
    first.write(tmp_path / "core.parquet")
    core = core_paths(first)
    gone = sorted(paths(manifest_of(split_folder, core=HALF, part="user")))[:4]
    for number, path in enumerate(gone):
        (split_folder / path).rename(split_folder / "train" / "bee" / f"new{number}.png")
    assert core_paths(manifest_of(split_folder, core=HALF)) != core  # drawn afresh, others would be core
    for asked in (HALF, None):
        user = manifest_of(split_folder, core=asked, part="user", manifest=tmp_path / "core.parquet")
        assert core_paths(user) == core
        assert not paths(user) & core
        assert len(paths(user)) == 15  # new files were in no training of the core


def test_samples_that_are_forgotten_move_nobody_into_the_core(split_folder, tmp_path):
    first = manifest_of(split_folder, core=HALF, part="user")
    first.forget(first.rows("train")["index"].to_numpy()[:5]).write(tmp_path / "user.parquet")
    later = manifest_of(split_folder, core=HALF, part="user", manifest=tmp_path / "user.parquet")
    assert core_paths(later) == core_paths(first)
    assert paths(later) == set(first.rows("train")["path"].iloc[5:])
    core = manifest_of(split_folder, core=HALF, part="core", manifest=tmp_path / "user.parquet")
    assert paths(core) == core_paths(first)


def test_another_core_than_that_of_the_manifest_is_refused(split_folder, tmp_path):
    manifest_of(split_folder, core=HALF).write(tmp_path / "m.parquet")
    with pytest.raises(ValueError, match=r'"seed": 1} is another core than that .* Set data\.core=null'):
        manifest_of(split_folder, core={"fraction": 0.5, "seed": 1}, manifest=tmp_path / "m.parquet")


def test_manifests_from_before_there_was_a_core_have_none(split_folder, tmp_path):
    manifest_of(split_folder).write(tmp_path / "m.parquet")
    table = pq.read_table(tmp_path / "m.parquet")
    old = pa.table(table.drop_columns("core")).replace_schema_metadata({b"classes": table.schema.metadata[b"classes"]})
    pq.write_table(old, tmp_path / "old.parquet")
    assert core_paths(Manifest.read(tmp_path / "old.parquet")) == set()
    user = manifest_of(split_folder, core=HALF, part="user", manifest=tmp_path / "old.parquet")
    pd.testing.assert_series_equal(user.table["core"], manifest_of(split_folder, core=HALF).table["core"])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"part": "users"}, r"`part` must be all, core or user, got users\. Set data\.part=user"),
        ({"part": "user"}, r"data\.part=user needs to know the core data, got none\. Set data\.core="),
        ({"core": {"fraction": 1.0}}, r"`core` must be a fraction above 0 and below 1, got fraction 1\.0"),
        ({"core": {"fraction": 0.5, "sede": 1}}, r"\['sede'\] beside fraction.*Set data\.core="),
        ({"core": {"class": "dog"}}, r"data\.core={'class': 'dog'} chooses no core data: .*no class is called dog"),
        ({"core": "gone.txt"}, r"data\.core=gone\.txt chooses no core data"),
    ],
)
def test_a_core_that_cannot_be_told_is_refused(split_folder, options, message):
    with pytest.raises(ValueError, match=message):
        manifest_of(split_folder, **options)


def test_samples_without_a_class_are_user_data(split_folder, add_images):
    add_images(split_folder / "unlabeled", 4)
    core, user = (manifest_of(split_folder, core=HALF, part=part).training_rows() for part in ("core", "user"))
    assert set(core["split"]) == {"train"}
    assert (user["split"] == "unlabeled").sum() == 4
