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


def labeled(**options):
    return manifest_of(**options).rows("train")


@pytest.mark.parametrize("fraction", [0.001, 0.1, 0.37, 1.0])
def test_labels_are_a_share_of_every_class(fraction):
    manifest = manifest_of(label_fraction=fraction)
    everyone = manifest.training_rows()
    given = everyone[everyone["labeled"]].groupby("true_label").size()
    for label, size in everyone.groupby("true_label").size().items():
        assert given[label] == max(1, round(fraction * size))
    assert len(everyone) == len(labeled())  # the others are still there
    assert manifest.table.query("split != 'train'")["labeled"].all()


def test_smaller_shares_of_labels_are_subsets_of_larger_ones():
    shares = [set(labeled(label_fraction=fraction)["index"]) for fraction in (0.01, 0.1, 0.5, 1.0)]
    assert shares[0] < shares[1] < shares[2] < shares[3]
    few, more = (labeled(labels_per_class=count) for count in (3, 8))
    assert few.groupby("label").size().tolist() == [3] * 10
    assert set(few["index"]) < set(more["index"])


def test_the_label_seed_decides_whose_labels_are_used_and_the_subset_seed_does_not():
    chosen = [
        set(labeled(labels_per_class=5, **seeds)["index"]) for seeds in ({}, {"subset_seed": 1}, {"label_seed": 1})
    ]
    assert chosen[0] == chosen[1] != chosen[2]
    assert chosen[0] != set(labeled(shots=5)["index"])  # a lot of its own


@pytest.mark.parametrize("options", [{"label_fraction": 0.25}, {"labels_per_class": 2}])
def test_labels_are_chosen_among_the_used_images(options):
    manifest = manifest_of(shots=8, **options)
    assert manifest.training_rows().groupby("true_label").size().tolist() == [8] * 10
    assert manifest.rows("train").groupby("label").size().tolist() == [2] * 10


def test_noise_is_counted_among_the_labeled_samples():
    manifest = manifest_of(label_noise=0.3, label_fraction=0.2)
    table, train = manifest.table, manifest.rows("train")
    wrong = table["label"] != table["true_label"]
    assert wrong.sum() == (train["label"] != train["true_label"]).sum() == round(0.3 * len(train))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"label_fraction": 0.0}, r"Set data\.label_fraction="),
        ({"label_fraction": 1.1}, r"Set data\.label_fraction="),
        ({"labels_per_class": 0}, r"Set data\.labels_per_class="),
        ({"labels_per_class": 3, "label_fraction": 0.5}, r"set data\.labels_per_class=null or data\.label_fraction=1"),
    ],
)
def test_choices_of_labels_out_of_range_name_their_override(options, message):
    with pytest.raises(ValueError, match=message):
        ImageDataModule(DigitsSource(), **options)


def test_too_many_labels_name_the_class():
    with pytest.raises(
        ValueError, match=r"data\.labels_per_class=9 asks for 9 .*0 \(8\).*Set data\.labels_per_class=8"
    ):
        manifest_of(shots=8, labels_per_class=9)


def test_a_class_of_one_image_keeps_its_label():
    assert labeled(shots=1, label_fraction=0.5).groupby("label").size().tolist() == [1] * 10
