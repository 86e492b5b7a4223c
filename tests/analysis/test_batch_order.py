from itertools import islice

import pytest
import torch

from lqf_lightning.analysis.batch_order import batch_order
from lqf_lightning.data.sampler import TrainingSampler


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("drop_last", [False, True])
def test_the_batches_are_those_that_all_ranks_get_together(world, drop_last):
    ranks = [
        TrainingSampler(11, 5, rank=rank, world_size=world, batch_size=6 // world, drop_last=drop_last)
        for rank in range(world)
    ]
    found = batch_order(ranks[-1])
    for epoch in range(3):
        orders = []
        for rank in ranks:
            rank.set_epoch(epoch)
            orders.append([position for _, position in rank])
        for step in range(-(-len(orders[0]) // (6 // world))):
            part = slice(step * (6 // world), (step + 1) * (6 // world))
            expected = sorted(position for order in orders for position in order[part])
            assert sorted(next(found).tolist()) == expected


def test_an_epoch_cut_short_goes_on_with_the_next():
    sampler = TrainingSampler(8, 0, batch_size=2)
    whole, short = list(islice(batch_order(sampler), 8)), list(islice(batch_order(sampler, 3), 6))
    for one, two in zip(short, whole[:3] + whole[4:7], strict=True):
        assert torch.equal(one, two)
