from dataclasses import dataclass
from functools import partial

import pytest
from hydra.errors import InstantiationException
from omegaconf import DictConfig, ListConfig, OmegaConf

from lqf_lightning._instantiate import instantiate, instantiate_all


@dataclass(frozen=True)
class Facts:
    """Hydra would turn this into a configuration node on the way."""

    number: int


class Plain:
    def __init__(self, size=1, *, facts=None, options=None, inner=None):
        if size < 0:
            raise ArithmeticError(f"{size} is negative")
        self.size, self.facts, self.options, self.inner = size, facts, options, inner


def anything(**options):
    return options


def config(**node):
    return OmegaConf.create({"group": {"_target_": "test_instantiate.Plain", **node}})


@pytest.fixture(autouse=True)
def importable(monkeypatch):
    """Under pytest's importlib mode this file is no module that a target could name."""
    import sys

    monkeypatch.setitem(sys.modules, "test_instantiate", sys.modules[__name__])


def test_the_target_is_called_with_plain_values():
    built = instantiate(config(size=3, options={"a": [1, {"b": 2}]}), "group")
    assert built.size == 3
    assert built.options == {"a": [1, {"b": 2}]}
    assert not isinstance(built.options, DictConfig)
    assert not isinstance(built.options["a"], ListConfig)


def test_extra_arguments_arrive_as_they_are():
    facts = Facts(7)
    assert instantiate(config(), "group", facts=facts).facts is facts


def test_partial_targets_wait_for_their_arguments():
    factory = instantiate(config(size=5, _partial_=True), "group")
    assert isinstance(factory, partial)
    facts = Facts(1)
    assert (factory(facts=facts).size, factory(facts=facts).facts) == (5, facts)


def test_nested_targets_are_built_too():
    built = instantiate(config(inner={"_target_": "test_instantiate.Plain", "size": 2}), "group")
    assert isinstance(built.inner, Plain)
    assert built.inner.size == 2


def test_values_refer_to_the_rest_of_the_configuration():
    whole = OmegaConf.merge(config(size="${seed}"), {"seed": 11})
    assert instantiate(whole, "group").size == 11


@pytest.mark.parametrize("extra", [{}, {"facts": Facts(0)}])
def test_an_exception_of_the_constructor_comes_through_unchanged(extra):
    with pytest.raises(ArithmeticError) as caught:
        instantiate(config(size=-4), "group", **extra)
    assert caught.value.args == ("-4 is negative",)


def test_an_exception_of_a_nested_constructor_comes_through_unchanged():
    with pytest.raises(ArithmeticError) as caught:
        instantiate(config(inner={"_target_": "test_instantiate.Plain", "size": -4}), "group")
    assert caught.value.args == ("-4 is negative",)


@pytest.mark.parametrize("node", [None, {}, {"size": 3}])
def test_a_node_without_target_names_the_override(node):
    with pytest.raises(InstantiationException, match=r"`group` has no `_target_`.*group=\.\.\."):
        instantiate(OmegaConf.create({"group": node}), "group")


@pytest.mark.parametrize(
    "target", ["no_such_package.Thing", "test_instantiate.Plane", "torch.optim.no.such.thing", "torch..optim"]
)
def test_a_target_that_cannot_be_imported_is_named_with_its_key(target):
    with pytest.raises(InstantiationException, match=rf"`group\._target_={target}` cannot be imported: .+"):
        instantiate(config(_target_=target), "group")


def test_a_misspelled_key_is_answered_with_the_right_one():
    with pytest.raises(InstantiationException, match=r"`group\.szie` is no option.*Did you mean `group\.size`\? .*\["):
        instantiate(config(szie=1), "group")


def test_the_options_listed_are_those_a_user_can_set():
    with pytest.raises(InstantiationException, match=r"options: \['size', 'options', 'inner'\]"):
        instantiate(config(qqq=1), "group", facts=Facts(0))


def test_a_misspelled_key_of_a_nested_target_is_answered_too():
    nested = {"_target_": "test_instantiate.Plain", "szie": 2}
    with pytest.raises(InstantiationException, match=r"`group\.inner\.szie`.*Did you mean `group\.inner\.size`"):
        instantiate(config(inner=nested), "group")


def test_a_constructor_that_takes_any_key_gets_any_key():
    node = OmegaConf.create({"group": {"_target_": "test_instantiate.anything", "szie": 1}})
    assert instantiate(node, "group", more=2) == {"szie": 1, "more": 2}


def test_a_value_that_only_the_user_can_give_names_the_override():
    with pytest.raises(InstantiationException, match=r"`group\.inner\.size` must be given.*group\.inner\.size=\.\.\."):
        instantiate(config(inner={"_target_": "test_instantiate.Plain", "size": "???"}), "group")


def test_all_entries_of_a_group_are_built_in_order_and_null_is_off():
    entries = {name: {"_target_": "test_instantiate.Plain", "size": k} for k, name in enumerate("cab")}
    whole = OmegaConf.create({"callbacks": {**entries, "off": None}})
    assert [built.size for built in instantiate_all(whole, "callbacks")] == [0, 1, 2]


@pytest.mark.parametrize("content", [{}, {"callbacks": None}, {"callbacks": {}}, {"callbacks": []}])
def test_an_empty_group_gives_nothing(content):
    assert instantiate_all(OmegaConf.create(content), "callbacks") == []
