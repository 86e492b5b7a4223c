import shutil

import pytest

from lqf_lightning.data import FolderSource


def test_split_folders_are_read_as_they_are(split_folder):
    splits = FolderSource(split_folder).load()
    assert list(splits) == ["train", "test"]
    assert splits["train"].classes == ["ant", "bee", "cat"]
    assert splits["train"].paths[10] == "train/bee/000.png"
    assert splits["train"].labels == (0,) * 10 + (1,) * 10 + (2,) * 10
    assert splits["test"].labels.count(0) == 5


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Val"])
def test_validation_folders_may_have_several_names(split_folder, name):
    shutil.copytree(split_folder / "test", split_folder / name)
    assert len(FolderSource(split_folder).load()["val"].paths) == 13


def test_two_validation_folders_are_refused(split_folder):
    for name in ("val", "valid"):
        shutil.copytree(split_folder / "test", split_folder / name)
    with pytest.raises(ValueError, match="several folders for split val: val, valid"):
        FolderSource(split_folder).load()


def test_flat_folders_get_a_test_split_that_survives_deletions(split_folder):
    root = split_folder / "train"
    before = FolderSource(root).load()
    assert [before["test"].labels.count(label) for label in range(3)] == [2, 2, 2]
    assert not set(before["train"].paths) & set(before["test"].paths)
    gone = before["train"].paths[0]
    (root / gone).unlink()
    after = FolderSource(root).load()
    assert set(after["test"].paths) == set(before["test"].paths)
    assert set(after["train"].paths) == set(before["train"].paths) - {gone}
    assert set(FolderSource(root, split_seed=1).load()["test"].paths) != set(before["test"].paths)


def test_nested_folders_belong_to_their_class(split_folder):
    nested = split_folder / "train" / "ant" / "2024" / "may"
    nested.mkdir(parents=True)
    shutil.copy(split_folder / "train" / "ant" / "000.png", nested / "x.PNG")
    train = FolderSource(split_folder).load()["train"]
    assert train.labels[train.paths.index("train/ant/2024/may/x.PNG")] == 0


def test_hidden_and_other_files_are_passed_over(split_folder):
    (split_folder / "train" / ".ipynb_checkpoints").mkdir()
    (split_folder / "train" / "ant" / "._000.png").write_text("not an image")
    (split_folder / "train" / "ant" / "notes.txt").write_text("not an image")
    train = FolderSource(split_folder).load()["train"]
    assert train.classes == ["ant", "bee", "cat"]
    assert len(train.paths) == 30


def test_a_missing_root_says_where_it_looked(tmp_path):
    with pytest.raises(FileNotFoundError, match=rf"no folder {tmp_path}/nowhere.*data\.source\.root="):
        FolderSource(tmp_path / "nowhere").load()


def test_an_empty_root_says_what_was_expected(tmp_path):
    with pytest.raises(ValueError, match=r"no class folders.*<root>/train/<class>"):
        FolderSource(tmp_path).load()


def test_images_without_class_folders_are_refused(split_folder):
    with pytest.raises(ValueError, match=r"no class folders but 10 images directly in it"):
        FolderSource(split_folder / "train" / "ant").load()


def test_folders_without_images_say_what_they_hold(tmp_path):
    for name in ("ant", "bee"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.heic").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no images under .*2 files with \.heic.*data\.source\.root="):
        FolderSource(tmp_path).load()


def test_a_test_folder_without_a_train_folder_is_refused(split_folder):
    shutil.rmtree(split_folder / "train")
    with pytest.raises(ValueError, match=r"has \['test'\] but no folder train"):
        FolderSource(split_folder).load()


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.1])
def test_the_test_fraction_has_a_range(tmp_path, fraction):
    with pytest.raises(ValueError, match=r"Set data\.source\.test_fraction="):
        FolderSource(tmp_path, test_fraction=fraction)


@pytest.mark.parametrize("flat", [False, True])
def test_a_folder_without_labels_is_listed_with_either_layout(add_images, split_folder, flat):
    root = split_folder / "train" if flat else split_folder
    before = FolderSource(root).load()
    add_images(root / "Unlabeled" / "a" / "b", 2)
    add_images(root / "Unlabeled", 1)
    splits = FolderSource(root).load()
    unlabeled = splits.pop("unlabeled")
    assert unlabeled.paths == ["Unlabeled/000.png", "Unlabeled/a/b/000.png", "Unlabeled/a/b/001.png"]
    assert unlabeled.labels == [-1] * 3
    assert unlabeled.images.read(1).size == (12, 10)
    assert {name: (s.paths, s.labels, s.classes) for name, s in splits.items()} == {
        name: (s.paths, s.labels, s.classes) for name, s in before.items()
    }


def test_a_class_of_a_split_may_be_called_unlabeled(split_folder):
    for split in ("train", "test"):
        (split_folder / split / "cat").rename(split_folder / split / "unlabeled")
    splits = FolderSource(split_folder).load()
    assert splits["train"].classes == ["ant", "bee", "unlabeled"]
    assert "unlabeled" not in splits


def test_a_folder_without_labels_and_images_is_refused(split_folder):
    (split_folder / "unlabeled").mkdir()
    (split_folder / "unlabeled" / "list.txt").write_text("")
    with pytest.raises(FileNotFoundError, match=r"no images under .*unlabeled: .*1 files with \.txt.*remove unlabeled"):
        FolderSource(split_folder).load()
