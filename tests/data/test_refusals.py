import shutil

import numpy as np
import pytest

from lqf_lightning.data import ArrayImages, FolderSource, ImageDataModule, Samples
from lqf_lightning.data.refusals import refuse_unlearnable, refuse_unusable


def samples(labels, classes=("a", "b"), prefix="x"):
    images = ArrayImages(np.zeros((len(labels), 2, 2), dtype=np.uint8), "zeros")
    return Samples(images, [f"{prefix}/{n}" for n in range(len(labels))], labels, list(classes))


def test_good_data_pass():
    refuse_unusable({"train": samples([0, 1]), "test": samples([1, 0])})


@pytest.mark.parametrize("label", [2, -1])
def test_labels_outside_the_classes_are_named(label):
    with pytest.raises(ValueError, match=rf"outside 0\.\.1 .*first is {label} of x/1"):
        refuse_unusable({"train": samples([0, label, 1])})


def test_an_empty_class_folder_is_named(split_folder):
    (split_folder / "train" / "dog").mkdir()
    (split_folder / "test" / "dog").mkdir()
    with pytest.raises(ValueError, match="split train: no images for 1 of 4 classes: dog"):
        ImageDataModule(FolderSource(split_folder)).setup()


def test_other_classes_for_testing_are_named(split_folder):
    shutil.move(split_folder / "test" / "cat", split_folder / "test" / "cow")
    with pytest.raises(
        ValueError, match="split test has other classes than split train: missing cat; only in test cow"
    ):
        ImageDataModule(FolderSource(split_folder)).setup()


def test_one_class_is_refused(tmp_path, split_folder):
    shutil.copytree(split_folder / "train" / "ant", tmp_path / "one" / "ant")
    with pytest.raises(ValueError, match=r"at least two classes .* has \['ant'\]"):
        ImageDataModule(FolderSource(tmp_path / "one")).setup()


def test_classes_of_one_name_or_another_order_are_refused():
    with pytest.raises(ValueError, match="same name: a"):
        refuse_unusable({"train": samples([0, 1], ("a", "a"))})
    with pytest.raises(ValueError, match="another order"):
        refuse_unusable({"train": samples([0, 1]), "test": samples([0, 1], ("b", "a"))})


def test_missing_splits_are_named():
    with pytest.raises(ValueError, match=r"no train split, only \['test'\]"):
        refuse_unusable({"test": samples([0, 1])})
    with pytest.raises(ValueError, match="split test has no images"):
        refuse_unusable({"train": samples([0, 1]), "test": samples([])})


def test_the_unlabeled_split_has_images_and_no_labels():
    refuse_unusable({"train": samples([0, 1]), "unlabeled": samples([-1, -1], ())})
    with pytest.raises(ValueError, match=r"split unlabeled: 1 images have a label; the first is 1 of x/2"):
        refuse_unusable({"train": samples([0, 1]), "unlabeled": samples([-1, -1, 1], ())})
    with pytest.raises(ValueError, match="split unlabeled has no images"):
        refuse_unusable({"train": samples([0, 1]), "unlabeled": samples([], ())})


def test_a_class_without_labels_is_refused_with_what_took_them():
    classes, options = ["a", "b", "c"], {"label_noise": 0.4, "label_fraction": 1.0, "labels_per_class": None}
    refuse_unlearnable(classes, [2, 1, 0], [0, 0, 0], options)  # what counts is what the run is told
    with pytest.raises(ValueError, match=r"label of 1 of 3 classes: b\. Set data\.subset_ratio higher"):
        refuse_unlearnable(classes, [0, 2], [2, 0], options)
    with pytest.raises(ValueError, match=r"classes: b \(1 of them have.*\)\. Set data\.label_noise lower than 0\.4$"):
        refuse_unlearnable(classes, [0, 2, 2], [0, 1, 2], options)
    with pytest.raises(
        ValueError, match=r"classes: b, c \(1 of them.*label_noise lower than 0\.4\. Set data\.subset_ratio"
    ):
        refuse_unlearnable(classes, [0, 0], [0, 1], options)


def test_wrong_labels_of_an_earlier_run_name_its_manifest():
    options = {"label_noise": 0.0, "label_fraction": 0.1, "labels_per_class": None}
    with pytest.raises(ValueError, match=r"Set data\.manifest=null, .*, or data\.label_fraction higher than 0\.1$"):
        refuse_unlearnable(["a", "b"], [0, 0], [0, 1], options)
