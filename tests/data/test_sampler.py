from itertools import chain

import pytest

from lqf_lightning.data.sampler import SweepSampler, TrainingSampler, UnpaddedSampler


def global_steps(size, world_size, batch_size, epoch=0, **options):
    """The positions of every step over all processes."""
    share = batch_size // world_size
    orders = []
    for rank in range(world_size):
        sampler = TrainingSampler(size, 5, rank=rank, world_size=world_size, batch_size=share, **options)
        sampler.set_epoch(epoch)
        orders.append(list(sampler))
        assert len(orders[-1]) == len(sampler)
    steps = range(0, len(orders[0]), share)
    return [sorted(key for order in orders for key in order[start : start + share]) for start in steps]


@pytest.mark.parametrize("world_size", [1, 2, 3, 6])
@pytest.mark.parametrize("epoch", [0, 3])
def test_a_step_is_the_same_set_for_every_number_of_processes(world_size, epoch):
    reference = global_steps(30, 1, 6, epoch)
    assert global_steps(30, world_size, 6, epoch) == reference
    assert all({key[0] for key in step} == {epoch} for step in reference)


def test_only_the_last_step_repeats_samples():
    for world_size in (1, 2, 3):
        steps = global_steps(31, world_size, 6)
        assert steps[:-1] == global_steps(31, 1, 6)[:-1]
        repeated = len(list(chain.from_iterable(steps))) - 31
        assert repeated == -31 % world_size
        assert {position for _, position in chain.from_iterable(steps)} == set(range(31))


def test_dropping_the_last_batch_repeats_nothing():
    for world_size in (1, 2, 3):
        steps = global_steps(31, world_size, 6, drop_last=True)
        assert steps == global_steps(31, 1, 6)[:-1]


def test_fewer_samples_than_processes_are_repeated():
    steps = global_steps(2, 3, 3)
    assert len(steps) == 1
    assert {position for _, position in steps[0]} == {0, 1}


def test_epochs_are_shuffled_differently_and_repeatably():
    first, second = (list(chain.from_iterable(global_steps(30, 1, 6, epoch))) for epoch in (0, 1))
    assert [p for _, p in first] != [p for _, p in second]
    assert first == list(chain.from_iterable(global_steps(30, 1, 6, 0)))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("size", [1, 2, 7, 12])
def test_evaluation_sees_every_sample_exactly_once(size, world_size):
    seen, sizes = [], []
    for rank in range(world_size):
        sampler = UnpaddedSampler(size, rank=rank, world_size=world_size, batch_size=2)
        batches = list(sampler)
        assert len(batches) == len(sampler) >= 1
        assert all(len(batch) <= 2 for batch in batches)
        own = list(chain.from_iterable(batches))
        seen += own
        sizes.append(len(own))
    assert sorted(seen) == list(range(size))
    assert max(sizes) - min(sizes) <= 1


def test_a_process_without_samples_gets_one_batch_without_rows():
    assert list(UnpaddedSampler(2, rank=2, world_size=3, batch_size=4)) == [[]]


@pytest.mark.parametrize("world_size", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 7, 12])
@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_sweeps_repeat_the_evaluation_batches_with_as_many_on_every_process(size, world_size, batch_size):
    lengths = set()
    for rank in range(world_size):
        share = {"rank": rank, "world_size": world_size, "batch_size": batch_size}
        once, sampler = list(UnpaddedSampler(size, **share)), SweepSampler(size, 3, **share)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert batches == list(sampler)  # in the next epoch too
        sweep = batches[: len(batches) // 3]
        assert batches == sweep * 3
        assert sweep[: len(once)] == once
        assert not any(sweep[len(once) :])
        lengths.add(len(batches))
    assert lengths == {3 * len(UnpaddedSampler(size, rank=0, world_size=world_size, batch_size=batch_size))}
