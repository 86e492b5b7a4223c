import pytest
import torch

from lqf_lightning.analysis.with_weights import trained_weights, with_weights
from lqf_lightning.methods import Finetune
from methods.dense_lqf import build, scatter_deltas
from methods.tensors import CLASSES, SGD, build_backbone, snapshot


@pytest.mark.parametrize("make", [build, lambda: Finetune(build_backbone(), CLASSES, optimizer=SGD)])
def test_a_method_has_its_own_weights_back_also_after_an_error(make):
    method = make()
    before = snapshot(method)
    other = {name: weight + 1 for name, weight in trained_weights(method).items()}

    def fail():
        with with_weights(method, other):
            assert all(torch.equal(weight, other[name]) for name, weight in method.trained().items())
            raise RuntimeError("in between")

    with pytest.raises(RuntimeError, match="in between"):
        fail()
    after = method.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())


def test_changes_made_meanwhile_are_undone_without_other_weights_too():
    method = build()
    before = trained_weights(method)
    with with_weights(method, None):
        scatter_deltas(method)
    assert all(torch.equal(weight, before[name]) for name, weight in method.trained().items())


def test_copies_do_not_change_with_the_method():
    method = build()
    copies = trained_weights(method)
    scatter_deltas(method)
    assert all(not bool(weight.any()) for weight in copies.values())


@pytest.mark.parametrize("spoil", ["missing", "unknown", "shape"])
def test_weights_of_another_network_are_refused_before_anything_changes(spoil):
    method = build()
    weights = {name: weight + 1 for name, weight in trained_weights(method).items()}
    weight = weights.pop("fc.bias")
    weights |= {"missing": {}, "unknown": {"fc.bias": weight, "fc.more": weight}, "shape": {"fc.bias": weight[:2]}}[
        spoil
    ]
    with pytest.raises(ValueError, match=r"1 of 8 .*fc\..*Set checkpoint"):
        with_weights(method, weights).__enter__()
    assert all(not bool(weight.any()) for weight in method.trained().values())
