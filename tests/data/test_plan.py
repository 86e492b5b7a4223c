import pytest

from lqf_lightning.data import DigitsSource, FolderSource, ImageDataModule


def manifest_of(**options):
    data = ImageDataModule(DigitsSource(), **options)
    data.setup()
    return data.manifest


def test_validation_is_stratified_and_drawn_from_training():
    manifest = manifest_of(val_fraction=0.25)
    sizes = manifest.table.groupby(["split", "label"]).size()
    for label in range(10):
        train, val = sizes["train", label], sizes["val", label]
        assert val == round(0.25 * (train + val))
    assert (manifest.rows("test")["path"] == manifest_of(val_fraction=0.1).rows("test")["path"]).all()


def test_the_split_seed_decides_who_is_held_out():
    held_out = [set(manifest_of(split_seed=seed).rows("val")["path"]) for seed in (0, 0, 1)]
    assert held_out[0] == held_out[1] != held_out[2]


def test_a_validation_folder_is_used_instead(split_folder):
    (split_folder / "test").rename(split_folder / "val")
    data = ImageDataModule(FolderSource(split_folder), val_fraction=0.5)
    data.setup()
    assert data.manifest.table["split"].value_counts().to_dict() == {"train": 30, "val": 13}
    assert data.test_split == "val"


def test_subsets_are_nested_and_leave_other_splits_alone():
    manifests = {ratio: manifest_of(subset_ratio=ratio) for ratio in (1.0, 0.5, 0.1)}
    used = {ratio: set(manifest.rows("train")["index"]) for ratio, manifest in manifests.items()}
    assert used[0.1] < used[0.5] < used[1.0]
    assert len(used[0.5]) == round(0.5 * len(used[1.0]))
    assert {len(manifest.rows("test")) for manifest in manifests.values()} == {359}
    assert {len(manifest) for manifest in manifests.values()} == {1797}


def test_shots_are_equal_in_all_classes_and_nested():
    few, more = (manifest_of(shots=shots).rows("train") for shots in (3, 8))
    assert few.groupby("label").size().tolist() == [3] * 10
    assert more.groupby("label").size().tolist() == [8] * 10
    assert set(few["index"]) < set(more["index"])


@pytest.mark.parametrize("options", [{}, {"shots": 10}, {"subset_ratio": 0.37}])
def test_noise_is_counted_among_the_used_training_samples(options):
    manifest = manifest_of(label_noise=0.3, **options)
    table, train = manifest.table, manifest.rows("train")
    wrong = table["label"] != table["true_label"]
    assert wrong.sum() == (train["label"] != train["true_label"]).sum() == round(0.3 * len(train))
    assert [manifest.classes[label] for label in table["label"]] == table["class"].tolist()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 1.0}, r"`val_fraction` must be .* got 1\.0\. Set data\.val_fraction="),
        ({"label_noise": -0.1}, r"Set data\.label_noise="),
        ({"subset_ratio": 0.0}, r"Set data\.subset_ratio="),
        ({"shots": 0}, r"Set data\.shots="),
        ({"shots": 3, "subset_ratio": 0.5}, r"set data\.shots=null or data\.subset_ratio=1"),
    ],
)
def test_options_out_of_range_name_their_override(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(DigitsSource(), **options)


def test_too_many_shots_name_the_class():
    with pytest.raises(ValueError, match=r"data\.shots=200 asks for 200 training images per class"):
        manifest_of(shots=200)
