import math

import pytest
import torch
from torch import nn

from lqf_lightning.congruence.interpolation import fisher_interpolate, interpolate
from lqf_lightning.linear import LinearizedModel


def net(seed, dtype=torch.float32):
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(144, 3)).to(dtype)
    for steps in range(seed + 1):
        model(torch.randn(5, 3, 8, 8, dtype=dtype) + steps)
    return model


def bits(entry):
    return entry.reshape(-1).view(torch.uint8)


def fisher_of(state, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.rand(entry.shape, generator=generator) * 3
        for name, entry in state.items()
        if "running" not in name and entry.is_floating_point()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("weighted", [False, True])
def test_the_ends_are_the_models_bit_for_bit(dtype, weighted):
    old, new = net(0, dtype).state_dict(), net(1, dtype).state_dict()
    old["0.bias"][0], new["0.bias"][1] = math.inf, math.nan  # not even these may leak into the other end
    fisher = fisher_of(old)
    fisher["0.weight"][0] = 0
    for share, end in ((1, old), (1.0, old), (0, new), (0.0, new)):
        got = fisher_interpolate(old, new, share, fisher) if weighted else interpolate(old, new, share)
        assert list(got) == list(end)
        for name, entry in end.items():
            assert got[name].dtype == entry.dtype
            assert torch.equal(bits(got[name]), bits(entry))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_weights_lie_between_the_models(share):
    old, new = net(0).state_dict(), net(1).state_dict()
    got = interpolate(old, new, share)
    for name, entry in got.items():
        if not entry.is_floating_point():
            assert torch.equal(entry, new[name])
            continue
        exact = share * old[name].double() + (1 - share) * new[name].double()
        assert torch.equal(entry, exact.float()) or torch.allclose(entry.double(), exact, rtol=1.2e-7, atol=0)
    assert int(got["1.num_batches_tracked"]) == 2


def test_where_the_models_agree_the_average_agrees_bit_for_bit():
    old = net(0, torch.float64).state_dict()
    for share in (0.1, 0.3, 0.7):
        assert all(torch.equal(entry, old[name]) for name, entry in interpolate(old, old, share).items())


def test_results_share_no_memory_with_the_models():
    old, new = net(0).state_dict(), net(1).state_dict()
    for share in (0, 0.5, 1):
        for got in (interpolate(old, new, share), fisher_interpolate(old, new, share, {})):
            for name, entry in got.items():
                assert entry.data_ptr() not in (old[name].data_ptr(), new[name].data_ptr())
                assert not entry.requires_grad


def test_parameters_may_be_given_with_their_graph():
    old, new = (dict(nn.Linear(2, 2).named_parameters()) for _ in range(2))
    assert not interpolate(old, new, 0.5)["weight"].requires_grad


def test_outputs_of_an_affine_layer_are_interpolated_with_its_weights():
    torch.manual_seed(0)
    old, new, between = (nn.Linear(4, 3).double() for _ in range(3))
    x = torch.randn(6, 4, dtype=torch.float64)
    between.load_state_dict(interpolate(old.state_dict(), new.state_dict(), 0.3))
    assert torch.allclose(between(x), 0.3 * old(x) + 0.7 * new(x), rtol=1e-13, atol=1e-14)


def test_outputs_of_linearized_models_are_interpolated_with_their_weights():
    x = torch.randn(5, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    old, new, between = (LinearizedModel(net(0, torch.float64).eval(), example=x) for _ in range(3))
    for seed, model in enumerate((old, new)):
        generator = torch.Generator().manual_seed(seed)
        for delta in model.deltas.values():
            delta.data = torch.randn(delta.shape, dtype=torch.float64, generator=generator)
    between.load_state_dict(interpolate(old.state_dict(), new.state_dict(), 0.3))
    expected = 0.3 * old(x) + 0.7 * new(x)
    assert not torch.allclose(expected, old(x), rtol=1e-2)
    assert torch.allclose(between(x), expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("share", [0.2, 0.5, 0.99])
def test_the_fisher_weighs_every_entry(share):
    old, new = net(0, torch.float64).state_dict(), net(1, torch.float64).state_dict()
    fisher = fisher_of(old)
    fisher["0.weight"][0] = 0
    got = fisher_interpolate(old, new, share, fisher)
    for name, entry in got.items():
        if entry.is_floating_point():
            f = fisher[name].double() if name in fisher else 1.0
            exact = (share * f * old[name] + (1 - share) * new[name]) / (share * f + (1 - share))
            assert torch.allclose(entry, exact, rtol=1e-14, atol=1e-15)
    assert torch.equal(got["0.weight"][0], new["0.weight"][0])


def test_a_fisher_of_one_is_plain_interpolation():
    old, new = net(0).state_dict(), net(1).state_dict()
    ones = {name: torch.ones_like(entry) for name, entry in fisher_of(old).items()}
    got, plain = fisher_interpolate(old, new, 0.4, ones), interpolate(old, new, 0.4)
    assert all(torch.allclose(got[name].double(), plain[name].double(), rtol=2e-7, atol=0) for name in plain)


def test_a_larger_fisher_moves_towards_the_old_model():
    old, new = {"w": torch.zeros(4)}, {"w": torch.ones(4)}
    got = fisher_interpolate(old, new, 0.5, {"w": torch.tensor([0.0, 0.1, 1.0, 1e30])})["w"]
    assert (got.diff() < 0).all()
    assert (float(got[0]), float(got[3])) == (1.0, pytest.approx(0, abs=1e-29))


@pytest.mark.parametrize("share", [-0.1, 1.1, math.nan])
def test_a_share_outside_its_range_is_refused(share):
    with pytest.raises(ValueError, match=r"from 0 \(the new model\) to 1 \(the old one\), got"):
        interpolate({}, {}, share)
    with pytest.raises(ValueError, match="share of the old model"):
        fisher_interpolate({}, {}, share, {})


@pytest.mark.parametrize("call", [interpolate, lambda old, new, share: fisher_interpolate(old, new, share, {})])
def test_other_architectures_are_refused_with_what_differs(call):
    old, new = nn.Linear(3, 2).state_dict(), nn.Linear(4, 2, bias=False).state_dict()
    with pytest.raises(ValueError, match=r"bias is missing in the new; weight is \(2, 3\) .* and \(2, 4\)"):
        call(old, new, 0.5)
    with pytest.raises(ValueError, match=r"bias is missing in the old"):
        call(new, old, 1)
    with pytest.raises(ValueError, match=r"weight is .*float32 in the old and .*float64 in the new"):
        call(new, {"weight": new["weight"].double()}, 0)


@pytest.mark.parametrize(
    ("fisher", "words"),
    [
        ({"other": torch.ones(2)}, "holds other of shape .* no such entry"),
        ({"w": torch.ones(3)}, r"holds w of shape \(3,\), and the old model \(2,\)"),
        ({"count": torch.ones(())}, "holds count"),
        ({"w": torch.tensor([1.0, -1.0])}, "of w is negative or not finite"),
        ({"w": torch.tensor([1.0, math.nan])}, "of w is negative or not finite"),
        ({"w": torch.tensor([1.0, math.inf])}, "of w is negative or not finite"),
    ],
)
def test_a_fisher_that_does_not_fit_is_refused(fisher, words):
    state = {"w": torch.ones(2), "count": torch.tensor(3)}
    with pytest.raises(ValueError, match=words):
        fisher_interpolate(state, state, 0.5, fisher)
