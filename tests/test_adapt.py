import json
import os
import shutil
from importlib.metadata import version

import numpy as np
import pytest
import safetensors
import safetensors.torch
import torch
from torch import nn

from lqf_lightning.adapt import adapt
from lqf_lightning.adapted_file import verdict
from lqf_lightning.backbones import create_backbone
from lqf_lightning.backbones.features import penultimate_features
from lqf_lightning.data import FolderSource, ImageDataModule
from lqf_lightning.data.source import Samples
from lqf_lightning.data.unlabeled_images import UnlabeledImages
from lqf_lightning.train import build_trainer
from tiny import compose

EPOCHS, STEPS = 6, 3


@pytest.fixture(scope="module")
def published(tmp_path_factory):
    """A file that stands in for published weights: a network of five classes with statistics unlike a fresh one's."""
    torch.manual_seed(0)
    model = create_backbone("test_resnet", 5, library="timm", weights=None, head_std=0.5).model
    for norm in model.modules():
        if isinstance(norm, nn.BatchNorm2d):
            nn.init.uniform_(norm.weight, 0.5, 1.5)  # some are 0 at first
            nn.init.uniform_(norm.running_mean, -0.2, 0.2)
    path = tmp_path_factory.mktemp("published") / "net.pt"
    torch.save(model.state_dict(), path)
    return path


def run(folder, root, weights, *overrides):
    options = [
        f"data.source.root={root}", "data.image_size=32", "data.batch_size=6", "data.num_workers=0",
        "backbone=timm", "backbone.name=test_resnet", f"backbone.weights={weights}", f"trainer.max_epochs={EPOCHS}",
        "images.held_out=0.25", "data/augmentation=none", "progress=none", "logger=[]",
        f"paths.output_dir={folder}", "method.optimizer.lr=0.001",
    ]  # fmt: skip
    environment = dict(os.environ)
    try:
        return adapt(compose(*options, *overrides, name="adapt"))
    finally:
        os.environ.clear()
        os.environ.update(environment)


def told(path):
    with safetensors.safe_open(path, "pt") as file:
        metadata = file.metadata()
    plain = {"weights", "format", "architecture", "library", "part", "method", "adapted_from", "lqf_lightning"}
    return {name: value if name in plain else json.loads(value) for name, value in metadata.items()}


@pytest.fixture(scope="module")
def adapted(tmp_path_factory, folder_of_shapes, published):
    folder = tmp_path_factory.mktemp("adapted")
    return run(folder, folder_of_shapes, published)


def outputs(path, slope, classes=5):
    model = create_backbone("test_resnet", classes, library="timm", weights=path, leaky_slope=slope).model
    with torch.no_grad():
        return model(torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0)))


def test_the_file_says_what_it_is_and_where_it_comes_from(adapted, published, folder_of_shapes):
    facts = told(adapted)
    assert (facts["architecture"], facts["library"], facts["leaky_slope"]) == ("test_resnet", "timm", 0.1)
    assert facts["adapted_from"].startswith(f"file {published} (sha256 ")
    assert facts["weights"] == str(published)
    assert facts["data"]["root"] == str(folder_of_shapes)
    assert facts["images"] == {"train": 18, "held_out": 6}
    assert facts["steps"] == STEPS * EPOCHS
    assert facts["versions"]["torch"] == version("torch")
    assert set(facts["errors"]) == {"swapped", "adapted"}
    metrics = json.loads((adapted.parent / "metrics.json").read_text())
    for stage, gap in facts["errors"].items():
        assert {f"{stage}/{name}": value for name, value in gap.items()}.items() <= metrics.items()
        assert set(gap) == {"feature_error", "agreement"}


def test_the_file_holds_the_leaky_network_and_the_published_head(adapted, published):
    state, source = safetensors.torch.load_file(adapted), torch.load(published, weights_only=True)
    assert state.keys() == source.keys()
    kept = {name for name, tensor in state.items() if torch.equal(tensor, source[name])}
    assert {"fc.weight", "fc.bias"} <= kept
    assert "layer1.0.conv1.weight" not in kept


def test_another_run_reads_the_file_with_its_slope_and_no_other(adapted):
    assert outputs(adapted, 0.1).shape == (4, 5)
    with pytest.raises(ValueError, match=r"Set backbone\.leaky_slope=0\.1"):
        outputs(adapted, None)


def test_the_told_errors_are_those_of_the_written_network_and_show_that_adapting_helped(
    adapted, published, folder_of_shapes
):
    data = ImageDataModule(FolderSource(folder_of_shapes), image_size=32, num_workers=0, val_fraction=0.0)
    data.setup()
    original, *leaky = (
        create_backbone("test_resnet", 5, library="timm", weights=weights, leaky_slope=slope)
        for weights, slope in ((published, None), (published, 0.1), (adapted, 0.1))
    )
    data.normalization = (original.mean, original.std)
    images = torch.cat([batch.input for batch in UnlabeledImages(data, held_out=0.25).val_dataloader()])
    with torch.no_grad():
        wanted, *found = (penultimate_features(network, images).double() for network in (original, *leaky))
    spread = (wanted - wanted.mean(0)).square().sum()
    errors = [((features - wanted).square().sum() / spread).item() for features in found]
    told_errors = [told(adapted)["errors"][stage]["feature_error"] for stage in ("swapped", "adapted")]
    # The same float32 passes, in batches of other sizes
    assert errors == pytest.approx(told_errors, rel=1e-3)
    assert errors[1] < errors[0]


def test_no_label_enters(adapted, published, folder_of_shapes, tmp_path, monkeypatch):
    load = FolderSource.load

    def relabeled(self):
        splits = load(self)
        drawn = np.random.default_rng(0)
        return {
            name: Samples(s.images, s.paths, drawn.permutation(s.labels).tolist(), s.classes)
            for name, s in splits.items()
        }

    monkeypatch.setattr(FolderSource, "load", relabeled)
    again = run(tmp_path, folder_of_shapes, published)
    assert again.read_bytes() == adapted.read_bytes()


def test_an_interrupted_adaptation_goes_on_to_the_same_network(
    adapted, published, folder_of_shapes, tmp_path, monkeypatch
):
    class Interrupted(Exception):  # noqa: N818 - no error of ours
        pass

    def until_second_epoch(config, folder):
        trainer = build_trainer(config, folder)
        fit = trainer.fit

        def interrupted(method, **options):
            step = method.training_step

            def failing(batch, batch_idx):
                if trainer.current_epoch == 2:  # while activations are on their way
                    raise Interrupted
                return step(batch, batch_idx)

            method.training_step = failing
            fit(method, **options)

        trainer.fit = interrupted
        return trainer

    with monkeypatch.context() as patched:
        patched.setattr("lqf_lightning.adapt.build_trainer", until_second_epoch)
        with pytest.raises(Interrupted):
            run(tmp_path, folder_of_shapes, published)
    assert not (tmp_path / "leaky.safetensors").exists()
    path = run(tmp_path, folder_of_shapes, published)
    first, second = (safetensors.torch.load_file(file) for file in (adapted, path))
    assert all(torch.equal(tensor, second[name]) for name, tensor in first.items())
    assert told(path)["errors"] == told(adapted)["errors"]


def test_weights_without_a_head_are_adapted_by_their_features(published, folder_of_shapes, tmp_path):
    state = torch.load(published, weights_only=True)
    torch.save({name: tensor for name, tensor in state.items() if not name.startswith("fc.")}, tmp_path / "body.pt")
    path = run(tmp_path, folder_of_shapes, tmp_path / "body.pt", "trainer.max_epochs=1")
    assert "fc.weight" not in safetensors.torch.load_file(path)
    assert all(set(gap) == {"feature_error"} for gap in told(path)["errors"].values())


def test_an_existing_file_is_not_overwritten_unasked(adapted, published, folder_of_shapes, tmp_path):
    precious = shutil.copy(adapted, tmp_path / "precious.safetensors")
    before = adapted.read_bytes()
    with pytest.raises(FileExistsError, match=r"precious\.safetensors exists\. Set overwrite=true"):
        run(tmp_path, folder_of_shapes, published, f"output={precious}")
    run(
        tmp_path,
        folder_of_shapes,
        published,
        f"output={precious}",
        "overwrite=true",
        "slope=0.2",
        "trainer.max_epochs=1",
    )
    assert (tmp_path / "precious.safetensors").read_bytes() != before
    assert told(precious)["leaky_slope"] == 0.2
    assert not list(tmp_path.glob("*.partial"))


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["backbone.weights=null"], r"nothing to be re-aligned with\. Set backbone\.weights=default"),
        (["backbone.leaky_slope=0.1"], r"Set backbone\.leaky_slope=null; the slope of the new activations is slope="),
        (["backbone.fold_batch_norm=true"], r"Set backbone\.fold_batch_norm=false"),
        (["data.shots=2"], r"chooses images by their labels.*Set data\.shots=null"),
        (["output=net.pt"], r"must end in \.safetensors, got .*net\.pt\. Set output=net\.safetensors"),
        (["slope=1.5"], r"`slope` .*must be a number in \[0, 1\], got 1\.5\. Set slope=0\.1"),
        (["slope=null"], r"got None\. Set slope=0\.1"),
        (
            ["output=/dev/null/leaky.safetensors"],
            r"cannot write to /dev/null: .*Set output=FILE\.safetensors",
        ),
        (["data.batch_size=1"], r"less than two images each.*Set data\.batch_size=32"),
        (["data.batch_size=23"], r"18 training images, labeled or not, are fewer than data\.batch_size=23"),
    ],
)
def test_what_cannot_be_is_answered_with_the_override(published, folder_of_shapes, tmp_path, overrides, complaint):
    with pytest.raises(ValueError, match=complaint):
        run(tmp_path, folder_of_shapes, published, *overrides)
    assert not list(tmp_path.glob("*.safetensors"))
    assert not (tmp_path / "checkpoints").exists()  # nothing was trained


def test_a_network_that_is_leaky_already_is_not_swapped_again(adapted, folder_of_shapes, tmp_path):
    for slope in ("null", "0.1"):
        with pytest.raises(ValueError, match=r"leaky already, of slope 0\.1\. Set backbone\.weights to those of the"):
            run(
                tmp_path, folder_of_shapes, adapted, f"backbone.leaky_slope={slope}", f"output={tmp_path}/a.safetensors"
            )


def test_a_folder_is_not_overwritten(published, folder_of_shapes, tmp_path):
    (tmp_path / "net.safetensors").mkdir()
    with pytest.raises(FileExistsError, match=r"net\.safetensors is a folder\. Set output=FILE\.safetensors"):
        run(tmp_path, folder_of_shapes, published, f"output={tmp_path}/net.safetensors", "overwrite=true")


def test_an_adaptation_that_did_not_help_is_said_to_have_not():
    before = {"feature_error": 0.5, "agreement": 0.6}
    for after, part in (
        ({"feature_error": 0.6, "agreement": 0.7}, "is 0.6, and was 0.5 at best before. Give more images"),
        ({"feature_error": 0.4, "agreement": 0.5}, "fewer images get the original's class than before"),
        ({"feature_error": float("nan"), "agreement": 0.7}, "did not work"),
    ):
        worked, words = verdict({"swapped": {"feature_error": 2.0}, "statistics": before, "adapted": after})
        assert not worked
        assert part in words
    assert verdict({"statistics": before, "adapted": {"feature_error": 0.4, "agreement": 0.6}})[0]
