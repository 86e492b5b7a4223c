import logging
import shutil

import pytest
import safetensors.torch
import torch

from lqf_lightning.data import FolderSource, ImageDataModule, Manifest
from lqf_lightning.fitted_head import FILE, fit_probe
from lqf_lightning.train import build_method
from lqf_lightning.weights_origin import contents_behind, manifest_behind, note_seen_labels, warn_of_seen_images
from tiny import compose, run_tiny, tiny_overrides, write_shapes

BRIEF = ["method=finetune", "callbacks=[]", "trainer.max_epochs=1", "test=false"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """30 images for training and validation, 6 for testing."""
    root = tmp_path_factory.mktemp("images")
    write_shapes(root / "train", per_class=10, seed=0)
    write_shapes(root / "test", per_class=2, seed=1)
    return root


@pytest.fixture(scope="module")
def run(images, tmp_path_factory):
    """A finished run that held out 2 of 10 images of every class."""
    folder = tmp_path_factory.mktemp("first")
    run_tiny(folder, images, "data.val_fraction=0.2", *BRIEF)
    return folder


def data_of(images, **options):
    data = ImageDataModule(FolderSource(images), **options)
    data.setup()
    return data


def held_out(images, **options):
    return set(data_of(images, **options).manifest.rows("val")["path"])


def warnings_in(caplog):
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_run_from_weights_that_have_seen_its_validation_images_says_so(run, images, tmp_path, caplog):
    number = len(held_out(images, val_fraction=0.2, split_seed=7) - held_out(images, val_fraction=0.2))
    assert number > 0
    weights = f"backbone.weights={run}/checkpoints/last.ckpt@student"
    run_tiny(tmp_path / "2", images, weights, "data.val_fraction=0.2", "data.split_seed=7", *BRIEF)
    (text,) = [text for text in warnings_in(caplog) if "backbone.weights" in text]
    assert f"was trained on {number} of the 6 val images: accuracy there flatters" in text  # and on no test image
    assert f"Set data.manifest={run}/manifest.parquet, or the same data.split_seed and data.val_fraction" in text
    caplog.clear()
    override = f"data.manifest={run}/manifest.parquet"
    run_tiny(tmp_path / "3", images, weights, "data.val_fraction=0.2", "data.split_seed=7", override, *BRIEF)
    assert not [text for text in warnings_in(caplog) if "backbone.weights" in text]


def test_a_run_that_held_nothing_out_is_not_to_be_split_again(images, tmp_path, caplog):
    data_of(images, val_fraction=0).manifest.write(tmp_path / "manifest.parquet")
    warn_of_seen_images(str(tmp_path / "checkpoints" / "best.ckpt"), data_of(images, val_fraction=0.2))
    (text,) = warnings_in(caplog)
    assert "trained on 6 of the 6 val images" in text
    assert text.endswith("train it again with data.val_fraction=0.1, or validate and test on other images")
    assert "data.manifest" not in text


def test_test_images_are_counted_by_content(run, images, tmp_path, caplog):
    unseen = held_out(images, val_fraction=0.2)
    name = next(name for name in ("000.png", "001.png", "002.png") if f"train/red/{name}" not in unseen)
    root = tmp_path / "other"
    write_shapes(root / "train", per_class=3, seed=5)
    write_shapes(root / "test", per_class=2, seed=6)
    (root / "test" / "red" / "copied.png").write_bytes((images / "train" / "red" / name).read_bytes())
    warn_of_seen_images(f"{run}/checkpoints/last.ckpt", data_of(root))
    (text,) = warnings_in(caplog)
    assert "trained on 1 of the 7 test images: " in text


def test_nothing_is_said_where_nothing_was_seen(run, images, caplog):
    weights = f"{run}/checkpoints/last.ckpt"
    warn_of_seen_images(weights, data_of(images, val_fraction=0.2))
    for other in (None, "default", "package", "elsewhere/weights.pt"):
        warn_of_seen_images(other, data_of(images, val_fraction=0.2, split_seed=7))
    assert warnings_in(caplog) == []


def test_weights_of_a_run_lie_beside_its_manifest(run, tmp_path):
    manifest = run / "manifest.parquet"
    assert manifest_behind(f"{run}/checkpoints/best.ckpt") == manifest
    assert manifest_behind(f"{run}/checkpoints/last.ckpt@teacher") == manifest
    assert manifest_behind(f"{run}/student.safetensors") == manifest
    assert manifest_behind(f"{run}/checkpoints/weights.pt") is None
    assert manifest_behind(f"{tmp_path}/checkpoints/best.ckpt") is None


def test_a_run_takes_the_head_of_its_own_classes_only(run, images, tmp_path):
    trained = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]["model.fc.weight"]

    def head_with(root):
        weights = f"backbone.weights={run}/checkpoints/last.ckpt"
        config = compose(*tiny_overrides(root), "method=finetune", weights, f"paths.output_dir={tmp_path}")
        return build_method(config)[1].model.get_parameter("fc.weight").detach()

    assert torch.equal(head_with(images), trained)
    renamed = shutil.copytree(images, tmp_path / "renamed")
    for split in ("train", "test"):
        (renamed / split / "blue").rename(renamed / split / "black")
    assert not torch.isclose(head_with(renamed), trained).any(dim=1).all()


def test_training_images_that_the_weights_know_are_told_by_content(run, images, tmp_path, caplog):
    weights = f"backbone.weights={run}/checkpoints/last.ckpt"
    options = (*tiny_overrides(images), "method=finetune", f"paths.output_dir={tmp_path}")
    data, _ = build_method(compose(*options, weights, "data.val_fraction=0.2", "data.split_seed=7"))
    then = set(Manifest.read(run / "manifest.parquet").rows("train")["path"])
    table = data.manifest.table
    assert data.seen_by_weights.tolist() == [
        split == "train" and path in then for split, path in zip(table["split"], table["path"], strict=True)
    ]
    number = int(data.seen_by_weights.sum())
    assert 0 < number < 24
    assert [text for text in warnings_in(caplog) if f"were trained on {number} of the 24 training images" in text]
    other = tmp_path / "other"
    write_shapes(other / "train", per_class=3, seed=5)
    write_shapes(other / "test", per_class=2, seed=6)
    caplog.clear()
    elsewhere = [option for option in options if not option.startswith("data.source.root")]
    assert build_method(compose(*elsewhere, f"data.source.root={other}", weights))[0].seen_by_weights is None
    assert build_method(compose(*options, "data.val_fraction=0.2"))[0].seen_by_weights is None
    assert not [text for text in warnings_in(caplog) if "with their labels" in text]


def test_weights_know_what_the_weights_before_them_knew(run, images, tmp_path):
    write_shapes(tmp_path / "other" / "train", per_class=3, seed=5)
    write_shapes(tmp_path / "other" / "test", per_class=2, seed=6)
    weights = f"backbone.weights={run}/checkpoints/last.ckpt"
    run_tiny(tmp_path / "2", tmp_path / "other", weights, *BRIEF)
    first = frozenset(Manifest.read(run / "manifest.parquet").rows("train")["sha"])
    second = frozenset(Manifest.read(tmp_path / "2" / "manifest.parquet").rows("train")["sha"])
    assert contents_behind(f"{run}/checkpoints/last.ckpt@student") == first
    assert contents_behind(f"{tmp_path}/2/checkpoints/last.ckpt") == first | second
    for other in (None, "default", "package", "elsewhere/weights.pt"):
        assert contents_behind(other) == frozenset()


@pytest.mark.parametrize(("method", "known"), [("BYOL", False), ("MoCo", False), ("SupMoCo", True), ("Finetune", True)])
def test_training_without_labels_knows_none(run, tmp_path, method, known):
    shutil.copy(run / "manifest.parquet", tmp_path)
    (tmp_path / "config.yaml").write_text(f"method: {{_target_: lqf_lightning.methods.{method}}}\n")
    assert bool(contents_behind(f"{tmp_path}/checkpoints/last.ckpt")) is known


def adapted(path, weights):
    """A file as `lqf-adapt` leaves it, of a network that has learned from labels."""
    told = {"lqf_lightning": "1", "classes": '["a"]', "weights": str(weights), "leaky_slope": "0.1"}
    safetensors.torch.save_file({"fc.weight": torch.zeros(1)}, path, told)
    return str(path)


def test_an_adapted_network_knows_what_its_original_knew(run, images, tmp_path, caplog):
    weights = adapted(tmp_path / "leaky.safetensors", run / "checkpoints" / "last.ckpt")
    assert manifest_behind(weights) == run / "manifest.parquet"
    assert contents_behind(weights) == frozenset(Manifest.read(run / "manifest.parquet").rows("train")["sha"])
    assert manifest_behind(adapted(tmp_path / "leaky.safetensors", "default")) is None
    assert not warnings_in(caplog)


def test_weights_whose_run_is_not_to_be_found_are_said_to_be(run, images, tmp_path, caplog):
    data = data_of(images)
    note_seen_labels(adapted(tmp_path / "leaky.safetensors", tmp_path / "gone.ckpt"), frozenset(), data)
    (text,) = warnings_in(caplog)
    assert "whether these training images are among them is unknown" in text
    assert data.seen_by_weights is None


@pytest.mark.parametrize(("slope", "fits"), [("0.1", True), ("0.2", False), ("null", False)])
def test_a_leaky_run_is_gone_on_with_by_its_slope_alone(slope, fits, run, images, tmp_path):
    shutil.copy(run / "manifest.parquet", tmp_path)
    (tmp_path / "config.yaml").write_text("backbone: {leaky_slope: 0.1}\n")
    weights = f"backbone.weights={tmp_path}/checkpoints/last.ckpt"
    (tmp_path / "checkpoints").mkdir()
    shutil.copy(run / "checkpoints" / "last.ckpt", tmp_path / "checkpoints")
    config = compose(*tiny_overrides(images), "method=finetune", weights, f"backbone.leaky_slope={slope}")
    if fits:
        assert build_method(config)
        return
    with pytest.raises(ValueError, match=rf"slope 0\.1, got backbone\.leaky_slope={slope}.*leaky_slope=0\.1"):
        build_method(config)


def test_a_run_that_began_at_itself_is_looked_at_once(run, tmp_path):
    shutil.copy(run / "manifest.parquet", tmp_path)
    weights = f"{tmp_path}/checkpoints/last.ckpt"
    (tmp_path / "config.yaml").write_text(f"backbone: {{weights: {weights}}}\n")
    assert contents_behind(weights) == frozenset(Manifest.read(tmp_path / "manifest.parquet").rows("train")["sha"])


def test_weights_know_what_their_head_was_fitted_to(run, tmp_path):
    shutil.copy(run / "manifest.parquet", tmp_path)
    rows, label = torch.randn(6, 2, generator=torch.Generator().manual_seed(0)), torch.arange(6) % 2
    fit_probe(rows, label, ["a", "b"], frozenset({"core"})).write(tmp_path / FILE)
    assert "core" in contents_behind(f"{tmp_path}/checkpoints/last.ckpt")
