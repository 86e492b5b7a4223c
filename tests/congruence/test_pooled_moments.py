import pytest
import torch
import torch.distributed as dist

from lqf_lightning.congruence.pooled_moments import PooledMoments
from lqf_lightning.linear import current_reducer
from ranks import run_on_ranks


def draw(number, offset=0.0):
    return torch.randn(number, 3, 2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) + offset


def pooled(parts):
    moments = PooledMoments(torch.zeros(3))
    for part in parts:
        moments.add(part)
    return moments


def reference(values):
    flat = values.transpose(0, 1).flatten(1)
    return flat.mean(1), flat.var(1, unbiased=True)


@pytest.mark.parametrize("sizes", [[9], [1, 1, 7], [4, 0, 5], [2, 2, 2, 2, 1]])
def test_batches_of_any_size_give_the_moments_of_all(sizes):
    values = draw(9)
    moments = pooled(values.split(sizes))
    mean, variance = reference(values)
    assert int(moments.count) == 72
    assert torch.allclose(moments.mean, mean, rtol=1e-13, atol=1e-15)
    assert torch.allclose(moments.variance, variance, rtol=1e-13)


def test_a_large_mean_does_not_drown_the_variance():
    values = draw(8, offset=1e7)
    # Sums of squares would keep 2 digits: 1e14 against 1, in 16 digits.
    assert torch.allclose(pooled(values.split(3)).variance, reference(draw(8))[1], rtol=1e-8)


def test_values_of_low_precision_are_summed_in_double():
    values = (draw(50) + 100).to(torch.float32)
    assert torch.allclose(pooled(values.split(7)).variance, reference(values.double())[1], rtol=1e-12)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_give_the_moments_of_all(world_size):
    values = draw(7, offset=50.0)
    shares = {1: [values], 2: [values[:1], values[1:]], 3: [values[:0], values[:5], values[5:]]}[world_size]

    def compute():
        moments = pooled(shares[dist.get_rank()].split(2))
        moments.reduce(current_reducer())
        return moments.count, moments.mean, moments.variance

    mean, variance = reference(values)
    for count, got_mean, got_variance in run_on_ranks(world_size, compute):
        assert int(count) == 56
        assert torch.allclose(got_mean, mean, rtol=1e-14)
        assert torch.allclose(got_variance, variance, rtol=1e-12)
