import math

import pytest
import torch

from lqf_lightning.methods.sample_mean import SampleMean
from ranks import run_on_ranks


def filled(*pairs):
    mean = SampleMean()
    for value, size in pairs:
        mean.update(torch.tensor(value), size)
    return mean


def test_batches_count_by_their_size():
    assert filled((1.0, 3), (5.0, 1), (-2.0, 4)).compute().item() == 0.0


def test_a_nan_is_not_dropped():
    assert math.isnan(filled((1.0, 3), (math.nan, 1)).compute())
    assert filled((1.0, 3), (math.inf, 1)).compute() == math.inf


def test_an_empty_batch_does_not_count_whatever_its_value():
    assert filled((2.0, 3), (math.nan, 0)).compute().item() == 2.0


def test_without_samples_the_mean_is_not_a_number():
    assert math.isnan(filled((0.0, 0)).compute())


def test_many_small_batches_do_not_lose_digits():
    mean = filled(*[(0.1, 1)] * 3000)
    assert mean.compute().item() == torch.tensor(0.1).item()  # float32 sums would be off by 1e-5


def test_reset_starts_over():
    mean = filled((9.0, 2))
    mean.reset()
    mean.update(torch.tensor(1.0), 1)
    assert mean.compute().item() == 1.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_count_by_their_samples(world_size):
    pairs = [(1.0, 3), (5.0, 1), (7.0, 2)]
    shares = {1: [pairs], 2: [pairs[:1], pairs[1:]], 3: [pairs[:2], pairs[2:], [(0.0, 0)]]}[world_size]

    def compute():
        import torch.distributed as dist

        return filled(*shares[dist.get_rank()]).compute()

    assert [value.item() for value in run_on_ranks(world_size, compute)] == [pytest.approx(22 / 6)] * world_size


def test_a_module_in_half_precision_still_counts_in_double():
    mean = SampleMean()
    torch.nn.ModuleList([mean]).to(torch.bfloat16)
    for _ in range(1000):
        mean.update(torch.tensor(0.1, dtype=torch.float64), 1)
    assert mean.count.item() == 1000
    assert mean.compute().item() == pytest.approx(0.1, rel=1e-6)
