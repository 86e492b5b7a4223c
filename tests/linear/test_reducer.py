import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lqf_lightning.linear import DistributedReducer, Reducer
from ranks import run_on_ranks


def test_a_single_process_changes_nothing() -> None:
    reducer, tensor = Reducer(), torch.arange(3.0)
    assert reducer.sum_(tensor) is tensor
    assert reducer.broadcast_(tensor) is tensor
    assert tensor.tolist() == [0.0, 1.0, 2.0]
    assert (reducer.rank, reducer.world_size) == (0, 1)


def test_rows_and_indices_must_match() -> None:
    with pytest.raises(ValueError, match="got 2 rows and 3 indices"):
        Reducer().gather_rows(torch.zeros(2, 4), torch.arange(3))


def test_without_a_process_group_the_remedy_is_named() -> None:
    with pytest.raises(RuntimeError, match="init_process_group"):
        DistributedReducer()


def test_of_equal_indices_the_first_row_is_kept() -> None:
    rows, index = Reducer().gather_rows(torch.tensor([5.0, 1.0, 6.0, 2.0]), torch.tensor([9, 4, 9, 0]))
    assert index.tolist() == [0, 4, 9]
    assert rows.tolist() == [2.0, 1.0, 5.0]


def _shard(rank: int, world_size: int) -> tuple[Tensor, Tensor]:
    # Seven samples, dealt unevenly and out of order; sample 0 is padding on every rank, and rank 2 has nothing else.
    index = torch.tensor([6, 1, 3, 2, 5, 4])
    mine = index if world_size == 1 else [index[:4], index[4:], index[:0]][rank]
    index = torch.cat([mine, torch.zeros(1, dtype=torch.int64)])
    return torch.stack([index * 1.5, index.square().double()], 1), index


def _reduce() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    reducer = DistributedReducer()
    rows, index = reducer.gather_rows(*_shard(reducer.rank, reducer.world_size))
    total = reducer.sum_(torch.full((2, 3), float(reducer.rank + 1)).T)
    last = reducer.broadcast_(torch.full((3,), float(reducer.rank)), source=reducer.world_size - 1)
    assert (reducer.rank, reducer.world_size) == (dist.get_rank(), dist.get_world_size())
    return rows, index, total, last


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_rank_sees_the_whole(world_size: int) -> None:
    for rows, index, total, last in run_on_ranks(world_size, _reduce):
        expected = torch.arange(7)
        assert index.tolist() == expected.tolist()
        assert torch.equal(rows, torch.stack([expected * 1.5, expected.square().double()], 1))
        assert torch.equal(total, torch.full((3, 2), float(sum(range(1, world_size + 1)))))
        assert last.tolist() == [world_size - 1.0] * 3


def test_a_failing_rank_reports_its_traceback() -> None:
    def fail() -> None:
        raise ValueError("on purpose")

    with pytest.raises(RuntimeError, match="on purpose"):
        run_on_ranks(2, fail)
