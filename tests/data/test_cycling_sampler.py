import pytest

from lqf_lightning.data import CyclingSampler


def parts(keys, size):
    keys = list(keys)
    return [keys[start : start + size] for start in range(0, len(keys), size)]


def share(rank=0, world_size=1, size=5, length=24, batch_size=4, seed=3, epoch=0):
    """Samples of one process; `length` and `batch_size` are those of all together."""
    sampler = CyclingSampler(
        size, length // world_size, seed, rank=rank, world_size=world_size, batch_size=batch_size // world_size
    )
    sampler.set_epoch(epoch)
    return sampler


@pytest.mark.parametrize("size", [1, 2, 5, 24, 30])
def test_every_round_holds_every_sample_once(size):
    keys = list(share(size=size))
    assert len(keys) == len(share(size=size)) == 24
    for number, part in enumerate(parts(keys, size)):
        assert {key[0] for key in part} == {0}
        assert {key[2] for key in part} == {number}
        positions = sorted(key[1] for key in part)
        assert positions == list(range(size)) or (len(part) < size and len(set(positions)) == len(part))


def test_rounds_epochs_and_seeds_are_ordered_differently():
    def orders(**options):
        return [[key[1] for key in part] for part in parts(share(size=12, **options), 12)]

    drawn = [order for options in ({}, {"epoch": 1}, {"seed": 4}) for order in orders(**options)]
    assert len({tuple(order) for order in drawn}) == 6
    assert orders(epoch=1) == orders(epoch=1)


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("size", [3, 5, 30])
def test_a_step_is_the_same_collection_for_every_number_of_processes(world_size, size):
    alone = [sorted(step) for step in parts(share(size=size, epoch=2), 4)]
    own = [list(parts(share(rank, world_size, size, epoch=2), 4 // world_size)) for rank in range(world_size)]
    together = [sorted(key for part in step for key in part) for step in zip(*own, strict=True)]
    assert together == alone


@pytest.mark.parametrize("skip", [1, 7, 11, 12])
def test_skipping_leaves_the_rest_as_it_was(skip):
    sampler = share(rank=1, world_size=2)
    whole = list(sampler)
    sampler.skip = skip
    assert list(sampler) == whole[skip:]
