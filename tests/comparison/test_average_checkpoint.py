import pytest
import torch
from omegaconf import OmegaConf

from lqf_lightning.comparison.average_checkpoint import confirm_average, write_average
from lqf_lightning.comparison.inputs import open_data
from lqf_lightning.references import open_reference
from lqf_lightning.teachers import FrozenTeacher
from tiny import CLASSES, compose, run_tiny

OPTIONS = ["method=finetune", "callbacks=[]", "test=false", "trainer.max_epochs=1"]


@pytest.fixture(scope="module")
def like(tmp_path_factory, folder_of_shapes):
    root = tmp_path_factory.mktemp("written")
    run_tiny(root / "run", folder_of_shapes, *OPTIONS)
    return root / "run" / "checkpoints" / "last.ckpt"


@pytest.fixture
def written(like, tmp_path):
    """An average with weights of its own, and what was written of it."""
    config, data = open_data(compose(f"old={like}", f"new={like}", "+data.image_size=48", name="compare"))
    first = open_reference(like)
    with torch.no_grad():
        first.backbone.model.fc.bias += 1
    average = FrozenTeacher(first.backbone.model, first.classes, first.view, "average", first.backbone)
    return average, write_average(tmp_path / "average", average, like, config, data, {"kind": "bcwi"})


def test_what_is_opened_is_what_was_measured(written):
    average, path = written
    opened = confirm_average(path, average)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(opened(images), average(images))
    assert (opened.view, opened.classes) == (average.view, list(CLASSES))


def change_weights(path):
    content = torch.load(path, weights_only=True)
    content["state_dict"]["model.fc.bias"][0] += 1e-6
    torch.save(content, path)


def change_classes(path):
    content = torch.load(path, weights_only=True)
    content["hyper_parameters"]["classes"] = list(CLASSES[::-1])
    torch.save(content, path)


def change_images(path):
    written = path.parent.parent / "config.yaml"
    config = OmegaConf.load(written)
    config.data.image_size = 48
    OmegaConf.save(config, written)


@pytest.mark.parametrize(
    ("change", "what"),
    [(change_weights, "weights"), (change_classes, "classes"), (change_images, "view: got .*48.*expected .*32")],
)
def test_another_model_in_its_place_is_refused(change, what, written):
    average, path = written
    change(path)
    with pytest.raises(RuntimeError, match=rf"does not hold the average that was measured; {what}.*Set averages=null"):
        confirm_average(path, average)


def test_only_plain_networks_are_written(like, tmp_path):
    config, data = open_data(compose(f"old={like}", f"new={like}", name="compare"))
    first = open_reference(like)
    bare = FrozenTeacher(first.model, first.classes, first.view, "bare")
    with pytest.raises(ValueError, match=r"bare is no plain network.*Set averages=null"):
        write_average(tmp_path / "average", bare, like, config, data, {})
