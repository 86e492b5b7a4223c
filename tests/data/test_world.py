import os

import pytest

from lqf_lightning.data.world import World
from ranks import run_on_ranks


def test_one_process_is_the_first_of_one():
    assert World.find(None) == World(0, 1, 1)


def test_the_process_group_is_asked_without_a_trainer():
    assert run_on_ranks(2, lambda: tuple(World.find(None))) == [(0, 2, 2), (1, 2, 2)]


def test_the_global_batch_is_divided():
    assert [World(0, size, 1).share_batch(12) for size in (1, 2, 3)] == [12, 6, 4]


@pytest.mark.parametrize(("batch_size", "fitting"), [(32, "30 or 33"), (2, "3")])
def test_a_batch_that_cannot_be_divided_names_those_that_can(batch_size, fitting):
    with pytest.raises(
        ValueError, match=rf"data.batch_size={batch_size} .* 3 processes; set data.batch_size={fitting}$"
    ):
        World(1, 3, 1).share_batch(batch_size)


@pytest.mark.parametrize(("cores", "processes", "workers"), [(1, 1, 1), (16, 1, 8), (16, 4, 4), (2, 4, 1)])
def test_cores_are_divided_over_the_processes_of_a_machine(monkeypatch, cores, processes, workers):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(cores)), raising=False)
    assert World(0, processes, processes).share_cores() == workers
