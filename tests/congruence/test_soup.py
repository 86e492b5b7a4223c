import pytest
import torch
from torch import nn

from lqf_lightning.congruence.soup import soup


def states(number, dtype=torch.float32):
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)).to(dtype) for _ in range(number)]
    for steps, model in enumerate(models):
        for _ in range(steps + 1):
            model(torch.randn(5, 3, dtype=dtype))
    return [model.state_dict() for model in models]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_soup_of_one_is_the_model_bit_for_bit(dtype):
    (state,) = states(1, dtype)
    got = soup([state])
    for name, entry in state.items():
        assert torch.equal(got[name], entry)
        assert got[name].dtype == entry.dtype
        assert got[name].data_ptr() != entry.data_ptr()


@pytest.mark.parametrize("number", [2, 3, 7])
def test_weights_are_means_rounded_once(number):
    given = states(number)
    for name, entry in soup(iter(given)).items():
        if entry.is_floating_point():
            assert torch.equal(entry, torch.stack([s[name].double() for s in given]).mean(0).float())
        else:
            assert torch.equal(entry, given[0][name])


def test_the_order_does_not_matter():
    given = states(4)
    forward, backward = soup(given), soup(given[::-1])
    assert all(torch.equal(forward[n], backward[n]) for n in forward if forward[n].is_floating_point())


def test_small_weights_of_many_models_are_not_lost():
    got = soup({"w": torch.tensor([value])} for value in [1e8] + [1.0] * 999)
    assert float(got["w"]) == torch.tensor((1e8 + 999) / 1000).item()  # float32 sums would drop every 1


def test_the_given_states_stay_as_they_are():
    given = states(3, torch.float64)
    before = [{name: entry.clone() for name, entry in state.items()} for state in given]
    soup(given)
    for state, kept in zip(given, before, strict=True):
        assert all(torch.equal(state[name], kept[name]) for name in kept)


def test_no_model_and_unequal_models_are_refused():
    with pytest.raises(ValueError, match="no model to average"):
        soup([])
    with pytest.raises(ValueError, match=r"the first and the third model differ: w is \(1,\) .* and \(2,\)"):
        soup([{"w": torch.zeros(1)}, {"w": torch.zeros(1)}, {"w": torch.zeros(2)}])
    with pytest.raises(ValueError, match=r"the first and the 4th model differ"):
        soup([{"w": torch.zeros(1)}] * 3 + [{}])
