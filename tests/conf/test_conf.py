"""Every choice composes, every target exists, and every key is a parameter of its target."""

import inspect
from pathlib import Path

import hydra
import pytest
from omegaconf import OmegaConf

from tiny import compose

CONF = Path(__file__).parents[2] / "conf"
FILES = sorted(CONF.rglob("*.yaml"))
GIVEN = {  # what only the user can give
    "callbacks/scrub": ["callbacks.scrub.cohort=[0]"],
    "data/folder": ["data.source.root=x"],
    "backbone/timm": ["backbone.name=x"],
    "backbone/torchvision": ["backbone.name=x"],
}
BEFORE = {  # groups that not every method has
    "method/preconditioner": ["method/preconditioner=kfac"],
    "method/views": ["method=moco"],
}
CHOICES = [path.relative_to(CONF).with_suffix("").as_posix() for path in FILES if path.parent != CONF]
CHOICES = [choice for choice in CHOICES if not Path(choice).name.startswith("_")]


def targets(node, path=""):
    if OmegaConf.is_dict(node):
        if "_target_" in node:
            yield path, node
        for key in node:
            yield from targets(node[key], f"{path}.{key}")


def composed(choice):
    group, _, option = choice.rpartition("/")
    value = f"[{option}]" if group in ("callbacks", "logger") else option
    before = BEFORE.get(group, [])
    return compose(*before, f"{group}={value}", *GIVEN.get(choice, []), "paths.output_dir=out")


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_composes_and_its_keys_are_parameters(choice):
    config = composed(choice)
    found = dict(targets(config))
    assert found
    for path, node in found.items():
        parameters = inspect.signature(hydra.utils.get_object(node["_target_"])).parameters
        if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
            continue
        unknown = {key for key in node if not key.startswith("_")} - set(parameters)
        assert not unknown, f"{path}: {node['_target_']} has no {unknown}"


@pytest.mark.parametrize("choice", CHOICES)
def test_choice_resolves_to_plain_values(choice):
    config = composed(choice)
    OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(CONF)))
def test_file_is_short_and_says_when_to_choose_it(path):
    lines = path.read_text().splitlines()
    assert lines[0].startswith("# ")
    assert lines[0].endswith((".", ":", "?"))
    assert len(lines) <= 32 if path.parent == CONF else len(lines) <= 25


@pytest.mark.parametrize("choice", [c for c in CHOICES if c.startswith("trainer/")])
def test_trainer_choices_have_about_five_keys(choice):
    assert len(composed(choice).trainer) <= 8  # with _target_


def test_method_files_and_tests_share_their_stem():
    from lqf_lightning import methods

    root = CONF.parent
    for module in (
        "finetune", "focal_distillation", "lqf", "mixed_privacy", "moco", "supmoco", "byol", "fixmatch",
        "self_distillation",
    ):  # fmt: skip
        assert (CONF / "method" / f"{module}.yaml").exists()
        assert (Path(methods.__file__).parent / f"{module}.py").exists()
        assert (root / "tests" / "methods" / f"test_{module}.py").exists()
    for path in (CONF / "callbacks").glob("*.yaml"):
        assert (root / "callbacks" / f"{path.stem}.py").exists()
        assert (root / "tests" / "callbacks" / f"test_{path.stem}.py").exists()


def test_choosing_callbacks_loses_neither_checkpoints_nor_progress():
    config = compose("callbacks=[]", "paths.output_dir=out")
    assert not config.get("callbacks")
    assert set(config.checkpoints) == {"best", "last"}
    assert config.progress._target_.endswith("ProgressBar")


@pytest.mark.parametrize(("method", "other"), [("moco", "byol"), ("byol", "two_views"), ("fixmatch", "two_views")])
def test_views_and_optimizers_of_a_method_can_be_chosen(method, other):
    config = compose(f"method={method}", f"method/views={other}", "method/optimizer=lars", "paths.output_dir=out")
    assert config.method.views == composed(f"method/views/{other}").method.views
    assert config.method.optimizer._target_ == "timm.optim.Lars"
    assert config.method.optimizer.trust_coeff == 0.001


def test_methods_built_on_another_one_differ_from_it_where_they_say():
    config = {name: dict(composed(f"method/{name}").method) for name in ("moco", "supmoco", "focal_distillation")}
    assert config["supmoco"] == config["moco"] | {
        "_target_": "lqf_lightning.methods.SupMoCo", "same_class": "positive",
    }  # fmt: skip
    average = dict(composed("method/self_distillation").method)
    added = {"momentum", "momentum_schedule", "momentum_warmup", "sync_statistics"}
    assert average.keys() - config["focal_distillation"].keys() == added
    assert average["reference"] is None
