import math

import pytest
import torch
from torch import nn

from linear.nets import build_net
from lqf_lightning.congruence.diagonal_fisher import diagonal_fisher
from lqf_lightning.congruence.interpolation import fisher_interpolate
from lqf_lightning.linear import current_reducer
from ranks import run_on_ranks


def images(number, seed=0, dtype=torch.float64):
    return torch.randn(number, 3, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def by_enumeration(net, x):
    """Squared gradients of every label's log-probability, one sample and one label at a time."""
    net.eval()
    total = {name: torch.zeros_like(parameter) for name, parameter in net.named_parameters()}
    for sample in x:
        for label in range(net(sample[None]).shape[1]):
            scores = net(sample[None]).log_softmax(-1)[0]
            gradients = torch.autograd.grad(scores[label], list(net.parameters()))
            for (name, sums), gradient in zip(total.items(), gradients, strict=True):
                total[name] = sums + scores[label].exp().detach() * gradient.square()
    return {name: sums / len(x) for name, sums in total.items()}


def close(got, expected, tolerance=1e-11):
    assert got.keys() == expected.keys()
    return all((got[n] - expected[n]).norm() <= tolerance * expected[n].norm().clamp(min=1e-12) for n in expected)


@pytest.mark.parametrize("kind", ["residual", "depthwise", "transformer"])
def test_the_fisher_is_that_of_all_labels_one_by_one(kind):
    net, x = build_net(kind), images(5)
    expected = by_enumeration(net, x)
    assert close(diagonal_fisher(net, [x]), expected)
    assert close(diagonal_fisher(net, iter([x[:1], x[1:1], x[1:]]), chunk=2), expected)


def test_a_network_in_training_mode_is_evaluated_and_left_as_it_was():
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 4), nn.BatchNorm1d(4), nn.Dropout(0.5), nn.Linear(4, 3)).double()
    net[3].eval()
    net.requires_grad_(False)
    before = {name: entry.clone() for name, entry in net.state_dict().items()}
    got = diagonal_fisher(net, [images(4)])
    assert [module.training for module in net.modules()] == [True, True, True, True, False, True]
    assert all(torch.equal(entry, before[name]) for name, entry in net.state_dict().items())
    assert not any(p.requires_grad or p.grad is not None for p in net.parameters())
    assert close(got, by_enumeration(net.requires_grad_(True), images(4)))


def test_drawn_labels_are_the_models_and_right_on_average():
    net, x = build_net("residual"), images(4)
    net[-1].weight.data *= 8  # unequal probabilities
    expected, draws = by_enumeration(net, x), 400
    got = diagonal_fisher(net, [x], draws=draws)
    for name, value in expected.items():
        assert (got[name] - value).norm() <= 4 / math.sqrt(draws) * value.norm(), name
    assert not close(got, expected, 1e-4)


def test_drawn_labels_have_the_models_frequencies():
    # One weight per class and the input 1: the squared gradient of the bias tells how often each label was drawn.
    net = nn.Linear(1, 3).double()
    nn.init.zeros_(net.weight)
    probabilities = torch.tensor([0.1, 0.3, 0.6], dtype=torch.float64)
    net.bias.data = probabilities.log()
    x = torch.arange(4000, dtype=torch.float64)[:, None]
    got = diagonal_fisher(net, [x], draws=1, chunk=4000)["bias"]
    # E over labels drawn with frequency f: f (1 - p)^2 + (1 - f) p^2
    frequency = (got - probabilities**2) / (1 - 2 * probabilities)
    deviation = (probabilities * (1 - probabilities) / 4000).sqrt()
    assert ((frequency - probabilities).abs() <= 4 * deviation).all()


def test_drawn_labels_belong_to_sample_and_seed():
    net, x = build_net("residual"), images(6)
    first = diagonal_fisher(net, [x], draws=2)
    assert close(diagonal_fisher(net, [x[[4, 0]], x[[5, 3, 2, 1]]], draws=2, chunk=1), first)
    assert not close(diagonal_fisher(net, [x], draws=2, seed=1), first, 1e-3)


def test_labels_of_the_data_play_no_part_where_the_model_is_sure():
    net = nn.Linear(2, 2).double()
    net.weight.data = torch.tensor([[60.0, 0.0], [0.0, 60.0]]).double()
    nn.init.zeros_(net.bias)
    got = diagonal_fisher(net, [torch.tensor([[1.0, 0.0]], dtype=torch.float64)])
    p = 1 / (1 + math.exp(-60))
    assert float(got["weight"][0, 0]) == pytest.approx(p * math.exp(-60) * p, rel=1e-9, abs=0)


def test_a_normalized_fisher_has_mean_one_and_the_same_proportions():
    net, x = build_net("depthwise"), images(3)
    plain, normalized = diagonal_fisher(net, [x]), diagonal_fisher(net, [x], normalize=True)
    values = torch.cat([entry.flatten() for entry in normalized.values()])
    assert float(values.mean()) == pytest.approx(1, rel=1e-12)
    ratio = torch.cat([entry.flatten() for entry in plain.values()]) / values
    assert torch.allclose(ratio[values > 0], ratio[values > 0][0], rtol=1e-11)


def test_a_shared_weight_is_found_under_both_names():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
            self.second.weight = self.first.weight

        def forward(self, x):
            return self.second(self.first(x).tanh())

    torch.manual_seed(0)
    net, x = Tied().double(), torch.randn(4, 3, dtype=torch.float64)
    got = diagonal_fisher(net, [x])
    assert torch.equal(got["first.weight"], got["second.weight"])
    assert close({"first.weight": got["first.weight"]}, by_enumeration(net, x))
    old = net.state_dict()
    between = fisher_interpolate(old, {name: torch.zeros_like(entry) for name, entry in old.items()}, 0.5, got)
    assert torch.equal(between["first.weight"], between["second.weight"])


def test_low_precision_gives_single_precision():
    net, x = build_net("residual", torch.float32), images(3, dtype=torch.float32)
    got = diagonal_fisher(net, [x])
    assert {entry.dtype for entry in got.values()} == {torch.float32}
    expected = by_enumeration(build_net("residual"), x.double())
    assert close({name: entry.double() for name, entry in got.items()}, expected, 1e-4)
    half = build_net("residual", torch.bfloat16)
    assert {entry.dtype for entry in diagonal_fisher(half, [x.bfloat16()]).values()} == {torch.float32}


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("draws", [None, 2])
def test_ranks_give_what_one_process_gives(world_size, draws):
    net, x = build_net("residual"), images(5)
    shares = {1: [x], 2: [x[:4], x[4:]], 3: [x[:2], x[2:2], x[2:]]}[world_size]

    def compute():
        import torch.distributed as dist

        own = shares[dist.get_rank()]
        batches = list(own.split(3)) if len(own) else []
        return diagonal_fisher(net, batches, draws=draws, normalize=True, reducer=current_reducer())

    alone = diagonal_fisher(net, [x], draws=draws, normalize=True)
    assert all(close(got, alone, 1e-12) for got in run_on_ranks(world_size, compute))


def test_nothing_to_compute_from_is_refused():
    net = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="there is no sample"):
        diagonal_fisher(net, [torch.zeros(0, 2)])
    with pytest.raises(ValueError, match="draws must be a positive number or None"):
        diagonal_fisher(net, [torch.zeros(1, 2)], draws=0)
    with pytest.raises(ValueError, match="the outputs depend on no weight"):
        diagonal_fisher(nn.Linear(2, 2, bias=False), [torch.zeros(1, 2)], normalize=True)
