import numpy as np
import pytest
import torch
from PIL import Image

from lqf_lightning.data import FolderSource, ImageDataModule, Manifest
from lqf_lightning.data.changed_data import refuse_changed_data


@pytest.fixture
def run(split_folder, tmp_path):
    """The manifest of a run, and a way to open it again."""

    def opened(manifest=None, **options):
        data = ImageDataModule(FolderSource(split_folder), manifest=manifest, **options)
        data.setup()
        return data.manifest

    opened().write(tmp_path / "m.parquet")
    return Manifest.read(tmp_path / "m.parquet"), lambda **options: opened(tmp_path / "m.parquet", **options)


NOBODY = torch.zeros(0, dtype=torch.int64)


def test_unchanged_data_is_fine(run):
    before, again = run
    refuse_changed_data(before, again(), NOBODY)


def test_new_training_files_are_refused(run, split_folder):
    Image.new("RGB", (5, 5), "red").save(split_folder / "train" / "ant" / "new.png")
    before, again = run
    with pytest.raises(ValueError, match=r"1 training samples are not those of the run: train/ant/new\.png.*Move"):
        refuse_changed_data(before, again(), NOBODY)


def test_other_options_are_refused(run):
    before, again = run
    with pytest.raises(ValueError, match="12 training samples of the run are gone without a request"):
        refuse_changed_data(before, again(shots=5), NOBODY)


def test_vanished_files_are_refused_unless_they_are_the_cohort(run, split_folder):
    before, again = run
    row = before.rows("train").iloc[4]
    (split_folder / row["path"]).unlink()
    refuse_changed_data(before, again(), torch.tensor([row["index"]]))
    with pytest.raises(ValueError, match=f"1 training samples of the run are gone without a request: {row['path']}"):
        refuse_changed_data(before, again(), NOBODY)


def test_what_was_forgotten_before_may_be_gone(run, split_folder, tmp_path):
    before, again = run
    row = before.rows("train").iloc[4]
    before.forget(np.array([row["index"]])).write(tmp_path / "m.parquet")
    (split_folder / row["path"]).unlink()
    refuse_changed_data(Manifest.read(tmp_path / "m.parquet"), again(), NOBODY)


def test_other_contents_and_labels_are_refused(run):
    before, again = run
    for column, value in (("sha", "0" * 40), ("label", 2)):
        now = again()
        row = now.rows("train").iloc[4]
        now.table.loc[row["index"], column] = value
        with pytest.raises(ValueError, match=f"1 training samples have other contents or labels.*{row['path']}"):
            refuse_changed_data(before, now, NOBODY)
