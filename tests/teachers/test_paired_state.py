import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

from lqf_lightning.teachers.paired_state import Pairs, pair_states


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def test_every_entry_is_paired_with_the_one_of_its_name_and_sorted_by_kind() -> None:
    one = net()
    one.register_buffer("seen", torch.tensor([True, False]))
    one.register_buffer("scratch", torch.ones(3), persistent=False)
    one.register_parameter("codes", nn.Parameter(torch.tensor([1, 2]), requires_grad=False))
    other = copy.deepcopy(one)
    pairs = pair_states(one, other)
    named = {id(value): name for module in (one, other) for name, value in module.state_dict(keep_vars=True).items()}
    kinds = {
        kind: [named[id(tensor)] for tensor in getattr(pairs, kind).own]
        for kind in ("weights", "statistics", "integers")
    }
    assert set(kinds["weights"]) == {f"{layer}.{name}" for layer in "012" for name in ("weight", "bias")}
    assert kinds["statistics"] == ["1.running_mean", "1.running_var"]
    assert set(kinds["integers"]) == {"1.num_batches_tracked", "seen", "codes"}
    for kind, names in kinds.items():
        assert [named[id(tensor)] for tensor in getattr(pairs, kind).other] == names
        assert all(a is not b for a, b in zip(getattr(pairs, kind).own, getattr(pairs, kind).other, strict=True))


def test_the_order_of_the_entries_does_not_matter() -> None:
    one = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    other = nn.ModuleDict({"b": nn.Linear(2, 2), "a": nn.Linear(2, 2)})
    pairs = pair_states(one, other).weights
    assert [id(tensor) for tensor in pairs.other] == [
        id(other[name].get_parameter(kind)) for name in "ab" for kind in ("weight", "bias")
    ]


def renamed(model: nn.Sequential) -> nn.Module:
    return nn.Sequential(*model[:2], nn.Identity(), model[2])


def added(model: nn.Sequential) -> nn.Module:
    return model.append(nn.Linear(2, 2))


def removed(model: nn.Sequential) -> nn.Module:
    return model[:2]


def reshaped(model: nn.Sequential) -> nn.Module:
    model[2] = nn.Linear(4, 5)
    return model


def broadcastable(model: nn.Sequential) -> nn.Module:
    model[2] = nn.Linear(4, 1)
    return model


def without_statistics(model: nn.Sequential) -> nn.Module:
    model[1] = nn.BatchNorm1d(4, track_running_stats=False)
    return model


CHANGES: dict[str, tuple[Callable[[nn.Sequential], nn.Module], str]] = {
    "renamed": (renamed, r"4 entries .* 2.bias, 2.weight, 3.bias, 3.weight\. Build"),
    "added": (added, r"2 entries .* 3.bias, 3.weight"),
    "removed": (removed, r"2 entries .* 2.bias, 2.weight"),
    "reshaped": (reshaped, r"2 entries .* 2.weight \(2, 4\) against \(5, 4\), 2.bias \(2,\) against \(5,\)"),
    "broadcastable": (broadcastable, r"2 entries .* 2.weight \(2, 4\) against \(1, 4\), 2.bias \(2,\) against \(1,\)"),
    "without statistics": (without_statistics, r"3 entries .* 1.num_batches_tracked, 1.running_mean, 1.running_var"),
}


@pytest.mark.parametrize(("change", "message"), CHANGES.values(), ids=CHANGES)
def test_networks_that_differ_are_refused_by_name(change: Callable[[nn.Sequential], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pair_states(net(), change(net()))


def tied() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    model[1].weight = model[0].weight
    return model


def test_a_shared_tensor_comes_once() -> None:
    pairs = pair_states(tied(), tied()).weights
    assert len(pairs.own) == len({id(tensor) for tensor in pairs.own}) == 3


def test_a_tensor_that_is_shared_no_longer_is_refused() -> None:
    untied = tied()
    untied[1].weight = nn.Parameter(untied[0].weight.clone())
    with pytest.raises(ValueError, match=r"1 entries .* 1.weight, which was one tensor with another entry"):
        pair_states(tied(), untied)


def test_a_tensor_that_is_shared_only_now_is_followed_by_both() -> None:
    own = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    other = tied()
    pairs = pair_states(own, other).weights
    assert len(pairs.own) == 4
    assert sum(tensor is other[0].weight for tensor in pairs.other) == 2


@torch.no_grad()
@pytest.mark.parametrize("share", [0.0, 0.001, 0.3, 0.5, 0.9, 1.0])
def test_an_average_is_a_point_between_the_two(share: float) -> None:
    own, other = torch.randn(50).double(), torch.randn(50).double()
    expected = [(1 - share) * a + share * b for a, b in zip(own.tolist(), other.tolist(), strict=True)]
    Pairs([own], [other]).average(share)
    torch.testing.assert_close(own, torch.tensor(expected, dtype=torch.float64), rtol=1e-15, atol=1e-15)


@torch.no_grad()
def test_an_average_of_equal_tensors_changes_no_bit() -> None:
    for share in (0.0, 0.001, 0.3, 0.7, 1.0):
        own = torch.randn(1000)
        other = own.clone()
        Pairs([own], [other]).average(share)
        assert torch.equal(own, other)


@torch.no_grad()
def test_a_share_of_one_forgets_what_was_no_number() -> None:
    own, other = torch.tensor([math.nan, math.inf, 1e30]), torch.tensor([1.0, 2.0, 1e-30])
    Pairs([own], [other]).average(1)
    assert torch.equal(own, other)


@torch.no_grad()
def test_tensors_of_several_types_are_averaged_in_the_own_type() -> None:
    own = [torch.ones(2), torch.ones(2).double(), torch.ones(2, dtype=torch.complex64)]
    other = [torch.full((2,), 2.0, dtype=torch.bfloat16), torch.full((2,), 2.0), torch.full((2,), 2.0 + 1j)]
    Pairs(own, other).average(0.001)
    assert own[0].tolist() == pytest.approx([1.001] * 2, rel=1e-7)
    assert own[1].tolist() == pytest.approx([1.001] * 2, rel=1e-15)
    assert own[2].tolist() == pytest.approx([1.001 + 0.001j] * 2, rel=1e-6)


def test_nothing_to_follow_is_no_error() -> None:
    for pairs in (Pairs([], []), Pairs([], []).over_ranks()):
        pairs.average(0.5)
        pairs.copy()
