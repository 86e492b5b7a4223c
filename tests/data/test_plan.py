import pandas as pd
import pytest

from lqf_lightning.data import DigitsSource, FolderSource, ImageDataModule, Manifest


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


NOISE = {"label_noise": 0.3}


def after(path, first, then):
    """The tables of a run and of a later one with its manifest."""
    before = manifest_of(**first)
    before.write(path)
    return Manifest.read(path), manifest_of(manifest=path, **then)


@pytest.mark.parametrize(
    "few", [{"label_fraction": 0.1}, {"labels_per_class": 5}, {"shots": 20}, {"subset_ratio": 0.3}]
)
def test_labels_that_an_earlier_run_was_not_told_draw_noise_of_their_own(tmp_path, few):
    before, manifest = after(tmp_path / "m.parquet", {**few, **NOISE}, NOISE)
    told = before.rows("train")
    train = manifest.rows("train").set_index("index")
    assert (train.loc[told["index"], "label"].to_numpy() == told["label"].to_numpy()).all()
    rest = train.drop(told["index"])
    assert len(rest) + len(told) == len(labeled())
    assert (rest["label"] != rest["true_label"]).sum() == round(0.3 * len(rest))
    assert [manifest.classes[label] for label in train["label"]] == train["class"].tolist()


def test_labels_that_an_earlier_run_was_told_stay_whatever_the_noise_is_now(tmp_path):
    before, manifest = after(tmp_path / "m.parquet", {"label_fraction": 0.1, **NOISE}, {"label_noise": 0.0})
    columns = ["index", "label", "class"]
    told = before.rows("train")[columns]
    pd.testing.assert_frame_equal(manifest.table.loc[told["index"], columns], told)
    wrong = (manifest.table["label"] != manifest.table["true_label"]).sum()
    assert wrong == round(0.3 * len(told))


@pytest.mark.parametrize(
    "options", [{"label_fraction": 0.1}, {"shots": 20, "labels_per_class": 5}, {"subset_ratio": 0.3}]
)
def test_the_same_options_give_the_same_table_also_after_an_earlier_run(tmp_path, options):
    before, again = after(tmp_path / "first", {**options, **NOISE}, {**options, **NOISE})
    pd.testing.assert_frame_equal(again.table, before.table)
    _, more = after(tmp_path / "first", {**options, **NOISE}, NOISE)  # and so do runs that go on from another one
    more.write(tmp_path / "second")
    pd.testing.assert_frame_equal(manifest_of(manifest=tmp_path / "second", **NOISE).table, more.table)
    pd.testing.assert_frame_equal(
        manifest_of(manifest=tmp_path / "first", **NOISE).table.drop(columns="sha"), more.table.drop(columns="sha")
    )


def test_a_file_that_comes_back_has_the_label_that_it_had(split_folder, tmp_path):
    def images(**options):
        data = ImageDataModule(FolderSource(split_folder), **NOISE, **options)
        data.setup()
        return data.manifest

    first = images()
    first.write(tmp_path / "first")
    train = first.rows("train")
    row = train[train["label"] != train["true_label"]].iloc[0]
    (split_folder / row["path"]).rename(tmp_path / "away.png")
    images(manifest=tmp_path / "first").write(tmp_path / "second")
    (tmp_path / "away.png").rename(split_folder / row["path"])
    back = images(manifest=tmp_path / "second")
    assert back.table.loc[row["index"], "label"] == row["label"]


@pytest.mark.parametrize(
    ("options", "advice"),
    [
        (
            {"labels_per_class": 1, "label_noise": 0.5},
            r"Set data\.label_noise lower than 0\.5, or data\.labels_per_class higher than 1, or null for all labels$",
        ),
        (
            {"label_fraction": 0.01, "label_noise": 0.5},
            r"Set data\.label_noise lower than 0\.5, or data\.label_fraction higher than 0\.01$",
        ),
        ({"shots": 1, "label_noise": 0.5}, r"Set data\.label_noise lower than 0\.5$"),
    ],
)
def test_classes_that_lose_every_label_to_noise_name_the_options_of_the_labels(options, advice):
    with pytest.raises(ValueError, match=rf"with the label of \d of 10 classes: .*wrong labels\)\. {advice}"):
        manifest_of(**options)


def test_classes_without_images_name_the_options_of_the_images():
    with pytest.raises(
        ValueError, match=r"label of \d of 10 classes: [\d, a-z]*\. Set data\.subset_ratio higher, data\.val_"
    ):
        manifest_of(subset_ratio=0.005)
