import inspect
from pathlib import Path

import pytest
from hydra.utils import instantiate
from omegaconf import OmegaConf

from lqf_lightning.backbones import create_backbone

GIVEN = {"num_classes", "classes"}  # by the data, never by a configuration
FILES = sorted(Path(__file__).parents[2].joinpath("conf", "backbone").glob("*.yaml"))


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_option_can_be_overridden_and_repeats_the_default_of_the_signature(path: Path) -> None:
    config = OmegaConf.to_container(OmegaConf.load(path))
    signature = inspect.signature(create_backbone).parameters
    assert isinstance(config, dict)
    assert config.pop("_target_") == "lqf_lightning.backbones.create_backbone"
    assert list(config) == [name for name in signature if name not in GIVEN]
    assert config["image_size"] == "${data.image_size}"
    chosen = {"name", "library", "weights", "image_size"}
    assert {k: v for k, v in config.items() if k not in chosen} == {
        k: p.default for k, p in signature.items() if k not in chosen | GIVEN
    }


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_every_choice_builds_without_a_network_once_weights_are_null(path: Path) -> None:
    given = {"timm": {"name": "convnext_atto"}, "torchvision": {"name": "mobilenet_v2"}}.get(path.stem, {})
    backbone = instantiate(OmegaConf.load(path), num_classes=3, weights=None, image_size=None, **given)
    assert backbone.model.get_submodule(backbone.head).out_features == 3


def test_quick_start_needs_no_network() -> None:
    (path,) = (path for path in FILES if path.stem == "efficientnet_lite0")
    assert instantiate(OmegaConf.load(path), num_classes=3, image_size=64).weights.startswith("pip package")
