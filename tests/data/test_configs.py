import inspect
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from hydra.utils import get_method, instantiate
from omegaconf import OmegaConf

from lqf_lightning.data import ImageDataModule
from lqf_lightning.data.torchvision_source import _KNOWN

CONF = Path(__file__).parents[2] / "conf" / "data"
SETS = sorted(path.stem for path in CONF.glob("[!_]*.yaml"))
AUGMENTATIONS = sorted(path.stem for path in (CONF / "augmentation").glob("*.yaml"))


def compose_data(*overrides, name="digits"):
    root = ["data.source.root=/nowhere"] if name == "folder" else []
    with initialize_config_dir(str(CONF.parent), version_base=None):
        config = compose(None, [f"+data={name}", "+seed=3", "+paths.data_dir=/nowhere", *root, *overrides])
    OmegaConf.resolve(config)
    return config.data


def parameters(node):
    return {key for key in node if key not in {"_target_", "_partial_"}}


def test_every_known_set_has_a_config():
    assert set(SETS) == {"digits", "folder", *_KNOWN}


@pytest.mark.parametrize("name", SETS)
def test_every_set_builds_a_module(name):
    config = compose_data(name=name)
    data = instantiate(config)
    assert isinstance(data, ImageDataModule)
    assert data.seed == 3
    assert parameters(config) == set(inspect.signature(ImageDataModule.__init__).parameters) - {"self"}
    assert parameters(config.source) <= set(inspect.signature(type(data.source).__init__).parameters)


@pytest.mark.parametrize("name", AUGMENTATIONS)
def test_every_augmentation_can_be_chosen(name):
    config = compose_data(f"data/augmentation={name}", "data.image_size=16")
    chosen = get_method(config.augmentation._target_)
    assert type(instantiate(config).training_transform) is chosen
    assert parameters(config.augmentation) <= set(inspect.signature(chosen.__init__).parameters)


def test_the_shared_options_repeat_the_defaults_of_the_constructor():
    written = OmegaConf.merge(*(OmegaConf.load(CONF / f"{name}.yaml") for name in ("_base", "_labels")))
    for name, parameter in inspect.signature(ImageDataModule.__init__).parameters.items():
        if name not in {"self", "source", "augmentation", "seed"}:
            assert written[name] == parameter.default, name


@pytest.mark.parametrize("path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.stem)
def test_files_are_short_and_say_when_to_choose_them(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert "hoose" in lines[0]
    assert len(lines) <= 25
    assert max(map(len, lines)) <= 120
