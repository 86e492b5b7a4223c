from lqf_lightning.data import Manifest
from lqf_lightning.data.seen_in_training import seen_in_training, seen_labels

CLASSES = ["ant", "bee"]


def hashed(*rows):
    """A manifest from split, content and whether it is used; no path occurs twice."""
    manifest = Manifest.build([(split, str(number), 0) for number, (split, *_) in enumerate(rows)], CLASSES)
    manifest.table["sha"] = [sha for _, sha, _ in rows]
    manifest.table["used"] = [used for *_, used in rows]
    return manifest


def test_used_training_images_of_any_of_the_runs_count_by_content(tmp_path):
    first = hashed(("train", "a", True), ("train", "b", False), ("val", "c", True), ("test", "d", True))
    second = hashed(("train", "e", True), ("train", "a", True))
    for name, manifest in (("first", first), ("second", second)):
        manifest.write(tmp_path / name)
    own = hashed(*[("val", sha, True) for sha in "abcde"], ("val", "a", True), ("val", "e", False), ("test", "e", True))
    assert seen_in_training(own, "val", tmp_path / "first") == 2  # both that are called a
    assert seen_in_training(own, "val", tmp_path / "first", tmp_path / "second") == 3
    assert seen_in_training(own, "test", tmp_path / "first") == 0
    assert seen_in_training(own, "val") == 0


def test_images_without_hash_count_as_unseen(tmp_path):
    other = hashed(("train", "a", True), ("train", "", True))
    other.table["removed"] = [False, False]
    other.hash_contents = lambda: None  # as of a file that is gone
    other.write(tmp_path / "other")
    assert seen_in_training(hashed(("val", "", True)), "val", tmp_path / "other") == 0


def test_training_images_without_a_label_count(tmp_path):
    other = hashed(("train", "a", True), ("unlabeled", "b", True))
    other.table["labeled"] = False
    other.write(tmp_path / "other")
    assert seen_in_training(hashed(("val", "a", True), ("val", "b", True)), "val", tmp_path / "other") == 2


def test_training_images_are_marked_by_content():
    own = hashed(("train", "a", True), ("train", "b", False), ("val", "a", True), ("train", "c", True))
    assert seen_labels(own, {"a", "b", ""}).tolist() == [True, True, False, False]
    own.table.loc[0, "removed"] = True
    assert seen_labels(own, {"a", "b"}).tolist() == [False, True, False, False]
    assert seen_labels(own, {"d"}) is None
    assert seen_labels(own, {""}) is None
    assert seen_labels(own, frozenset()) is None
