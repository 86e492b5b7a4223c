import copy

import pytest
import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import nn

from lqf_lightning.congruence.interpolation import interpolate
from lqf_lightning.congruence.reestimate_batch_norm import reestimate_batch_norm
from lqf_lightning.linear import current_reducer
from ranks import run_on_ranks


def images(number, seed=0):
    return torch.randn(number, 3, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 2 + 1


def shallow():
    torch.manual_seed(0)
    head = [nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3)]
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head).double()


def deep():
    torch.manual_seed(0)
    layers = [nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(20, 6), nn.BatchNorm1d(6), nn.Linear(6, 2)).double()


def pooled(activations):
    flat = activations.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=True)


def matches(layer, activations, tolerance=1e-12):
    mean, variance = pooled(activations)
    return torch.allclose(layer.running_mean, mean, rtol=tolerance, atol=tolerance) and torch.allclose(
        layer.running_var, variance, rtol=tolerance
    )


@pytest.mark.parametrize("sizes", [[10], [4, 4, 2], [7, 0, 3]])
def test_one_layer_gets_the_pooled_statistics_of_its_inputs(sizes):
    net, x = shallow(), images(10)
    net[1].running_mean += 30
    assert reestimate_batch_norm(net, iter(x.split(sizes))) == ["1"]
    assert matches(net[1], net[0](x))
    assert int(net[1].num_batches_tracked) == len([size for size in sizes if size])


def test_sorted_data_have_the_variance_between_their_batches_too():
    net = nn.BatchNorm1d(1).double()
    x = torch.cat([torch.zeros(4, 1), torch.full((2, 1), 6.0)]).double()
    reestimate_batch_norm(net, x.split([4, 2]))
    # Means over batches, as torch's `update_bn` makes them, would be 3 and 0.
    assert (float(net.running_mean), float(net.running_var)) == (pytest.approx(2.0), pytest.approx(9.6))


def test_shuffled_full_batches_agree_with_torchs_own_update():
    net, x = shallow(), images(4000)
    other = copy.deepcopy(net)
    reestimate_batch_norm(net, x.split(400))
    torch.optim.swa_utils.update_bn(x.split(400), other)
    assert torch.allclose(net[1].running_mean, other[1].running_mean, rtol=1e-12)
    assert torch.allclose(net[1].running_var, other[1].running_var, rtol=2e-3)  # spread of batch means, about 1 / 400


def test_the_first_pass_normalizes_by_the_statistics_of_each_batch():
    net, x = deep(), images(12)
    net[1].running_mean += 100  # must not matter
    batches = x.split([8, 4])
    seen = []
    for batch in batches:
        inner = nn.functional.batch_norm(net[0](batch), None, None, net[1].weight, net[1].bias, training=True)
        seen.append(net[3](inner.relu()))
    assert reestimate_batch_norm(net, batches) == ["1", "4", "8"]
    assert matches(net[1], net[0](x))
    assert matches(net[4], torch.cat(seen))


@pytest.mark.parametrize("sizes", [[12], [8, 4], [2, 2, 8]])
def test_as_many_passes_as_layers_make_every_layer_exact(sizes):
    net, x = deep(), images(12)
    reestimate_batch_norm(net, x.split(sizes), passes=3)
    net.eval()
    for depth in (1, 4, 8):
        assert matches(net[depth], net[:depth](x), 1e-11)


def test_fewer_passes_make_the_first_layers_exact():
    net, x = deep(), images(12)
    reestimate_batch_norm(net, x.split([8, 4]), passes=2)
    net.eval()
    assert matches(net[1], net[0](x), 1e-11)
    assert matches(net[4], net[:4](x), 1e-11)
    assert not matches(net[8], net[:8](x), 1e-4)


def test_an_interpolated_network_is_normalized_again():
    x = images(64)
    old, new, between = deep(), deep(), deep()
    with torch.no_grad():
        for parameter in new.parameters():
            parameter.add_(torch.randn(parameter.shape, dtype=torch.float64))
    for net in (old, new):
        reestimate_batch_norm(net, [x], passes=3)
    between.load_state_dict(interpolate(old.state_dict(), new.state_dict(), 0.5))
    between.eval()
    assert not matches(between[4], between[:4](x), 1e-2)
    reestimate_batch_norm(between, [x], passes=3)
    normalized = between[:8](x) - between[8].running_mean
    assert torch.allclose((normalized / between[8].running_var.sqrt()).std(0), torch.ones(6).double(), rtol=1e-10)


def test_only_the_running_statistics_change_and_drop_out_stays_off():
    net, x = shallow(), images(9)
    net[0].eval()
    net[3].train()
    before = {name: entry.clone() for name, entry in net.state_dict().items()}
    modes = [module.training for module in net.modules()]
    state = torch.get_rng_state()
    reestimate_batch_norm(net, [x])
    assert torch.equal(torch.get_rng_state(), state)  # drop-out would have drawn
    assert [module.training for module in net.modules()] == modes
    assert net[1].track_running_stats
    changed = {name for name, entry in net.state_dict().items() if not torch.equal(entry, before[name])}
    assert changed == {"1.running_mean", "1.running_var", "1.num_batches_tracked"}
    assert not net[1]._forward_pre_hooks


def test_a_pass_that_fails_leaves_the_network_as_it_was():
    net = shallow().eval()
    before = {name: entry.clone() for name, entry in net.state_dict().items()}
    with pytest.raises(RuntimeError):
        reestimate_batch_norm(net, [images(4), images(4)[:, :2]])
    assert all(torch.equal(entry, before[name]) for name, entry in net.state_dict().items())
    assert not any(module.training for module in net.modules())
    assert net[1].track_running_stats
    assert not net[1]._forward_pre_hooks


def test_layers_that_carry_an_activation_and_drop_out():
    torch.manual_seed(0)
    layer = BatchNormAct2d(3, drop_layer=nn.Dropout).double()
    x, state = images(5), torch.get_rng_state()
    reestimate_batch_norm(layer, x.split(3))
    assert torch.equal(torch.get_rng_state(), state)
    assert matches(layer, x)


def test_a_layer_that_is_used_twice_pools_both_uses():
    layer = nn.BatchNorm2d(3, affine=False).double()
    net = nn.Sequential(layer, nn.ReLU(), layer)
    x = images(4)
    reestimate_batch_norm(net, [x])
    inner = nn.functional.batch_norm(x, None, None, training=True).relu()
    assert matches(layer, torch.cat([x, inner]))


def test_layers_that_do_not_run_keep_their_statistics():
    class Auxiliary(nn.Module):
        def __init__(self):
            super().__init__()
            self.main, self.aux = nn.BatchNorm2d(3).double(), nn.BatchNorm2d(3).double()

        def forward(self, x):
            return self.main(x) + (self.aux(x) if self.training else 0)

    net = Auxiliary()
    assert reestimate_batch_norm(net, [images(4)]) == ["main"]
    assert torch.equal(net.aux.running_mean, torch.zeros(3).double())
    assert int(net.aux.num_batches_tracked) == 0


def test_a_network_without_running_statistics_needs_no_pass():
    net = nn.Sequential(nn.LayerNorm(6), nn.BatchNorm2d(3, track_running_stats=False)).double()
    assert reestimate_batch_norm(net, []) == []


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_get_the_pooled_statistics_of_all_data(world_size):
    net, x = shallow(), images(11)
    shares = {1: [x], 2: [x[:8], x[8:]], 3: [x[:0], x[:9], x[9:]]}[world_size]

    def compute():
        own = shares[dist.get_rank()]
        batches = own.split(4) if len(own) else []
        names = reestimate_batch_norm(net, batches, reducer=current_reducer())
        return names, net.state_dict()

    expected = pooled(net[0](x))
    for names, state in run_on_ranks(world_size, compute):
        assert names == ["1"]
        assert torch.allclose(state["1.running_mean"], expected[0], rtol=1e-13)
        assert torch.allclose(state["1.running_var"], expected[1], rtol=1e-13)
        assert int(state["1.num_batches_tracked"]) == sum(-(-len(share) // 4) for share in shares)


@pytest.mark.parametrize("world_size", [2, 3])
def test_stacked_layers_do_not_depend_on_ranks_after_enough_passes(world_size):
    net, x = deep(), images(12)
    shares = {2: [x[:4], x[4:]], 3: [x[:5], x[:0], x[5:]]}[world_size]

    def compute():
        own = shares[dist.get_rank()]
        reestimate_batch_norm(net, [own], passes=3, reducer=current_reducer())
        return net.state_dict()

    alone = deep()
    reestimate_batch_norm(alone, [x], passes=3)
    for state in run_on_ranks(world_size, compute):
        for name, entry in alone.state_dict().items():
            if "running" in name:
                assert torch.allclose(state[name], entry, rtol=1e-11, atol=1e-12), name


def test_what_cannot_be_estimated_is_refused():
    net = shallow()
    with pytest.raises(ValueError, match="there is no sample"):
        reestimate_batch_norm(net, [images(0)])
    with pytest.raises(ValueError, match="passes must be at least 1"):
        reestimate_batch_norm(net, [images(2)], passes=0)
    with pytest.raises(TypeError, match="spent after one pass, and there are 2"):
        reestimate_batch_norm(net, iter([images(2)]), passes=2)
    flat = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    with pytest.raises(ValueError, match=r"a batch of 1 image leaves one value per channel.*two images or more"):
        reestimate_batch_norm(flat, [torch.zeros(1, 2)])


def test_layers_that_wait_for_all_processes_are_refused_on_several():
    net = nn.SyncBatchNorm.convert_sync_batchnorm(shallow())

    def compute():
        dist.barrier()  # all are there before the first one leaves
        with pytest.raises(ValueError, match="1 waits for all processes"):
            reestimate_batch_norm(net, [images(2)], reducer=current_reducer())
        dist.barrier()

    run_on_ranks(2, compute)
