import pytest
import torch
from torch import Tensor

from linear.dense_ridge import normal
from lqf_lightning.linear import DistributedReducer
from lqf_lightning.linear.shard import Shard
from ranks import run_on_ranks


def test_rows_go_to_their_positions_and_come_back() -> None:
    rows, positions = normal(4, 3), torch.tensor([2, 0, 3, 1])
    shard = Shard(positions, 4)
    assert torch.equal(shard.spread(rows)[positions], rows)
    assert torch.equal(shard.own(shard.spread(rows)), rows)


def test_a_sample_held_twice_counts_once() -> None:
    shard, rows = Shard(torch.tensor([1, 0, 1, 1]), 2), normal(2, 3)
    held = rows[shard.positions]
    assert torch.allclose(shard.spread(held), rows, rtol=1e-15)
    assert torch.allclose(shard.own(rows).sum(0), rows.sum(0), rtol=1e-14)
    assert torch.allclose((held * shard.own(rows)).sum(), rows.square().sum(), rtol=1e-14)


def test_rows_of_single_precision_are_widened_before_they_are_added() -> None:
    spread = Shard(torch.tensor([0, 0, 0]), 1).spread(torch.full((3, 1), 0.1, dtype=torch.float32))
    assert spread.dtype == torch.float64
    assert spread.item() == pytest.approx(float(torch.tensor(0.1)), rel=1e-15)


@pytest.mark.parametrize("positions", [[0, 1, 3], [-1, 0, 1, 2], [0, 1, 2, 7]])
def test_positions_out_of_range_are_named(positions: list[int]) -> None:
    with pytest.raises(ValueError, match=r"1 positions are out of range: those of 3 samples lie in \[0, 3\)"):
        Shard(torch.tensor(positions), 3)


def test_samples_that_no_rank_holds_are_named() -> None:
    with pytest.raises(ValueError, match="2 of 5 samples are held by no rank, the first at position 2"):
        Shard(torch.tensor([0, 4, 1]), 5)


def _spread(rows: Tensor, shards: list[list[int]]) -> tuple[Tensor, Tensor]:
    reducer = DistributedReducer()
    shard = Shard(torch.tensor(shards[reducer.rank], dtype=torch.int64), len(rows), reducer)
    spread = shard.spread(rows[shard.positions])
    return spread, reducer.sum_(shard.own(spread).sum(0))


@pytest.mark.parametrize("shards", [[[2, 0, 1, 3]], [[3], [1, 0, 2, 3]], [[1, 3], [], [0, 2, 1]]])
def test_every_rank_sees_all_rows_and_each_counts_once(shards: list[list[int]]) -> None:
    rows = normal(4, 3)
    for spread, total in run_on_ranks(len(shards), _spread, rows, shards):
        assert torch.allclose(spread, rows, rtol=1e-15)
        assert torch.allclose(total, rows.sum(0), rtol=1e-14)


@pytest.mark.parametrize(
    ("shards", "message"), [([[0, 1], [2, 5]], "1 positions are out of range"), ([[0], [1]], "first at position 2")]
)
def test_all_ranks_fail_together(shards: list[list[int]], message: str) -> None:
    def fail() -> str:
        with pytest.raises(ValueError, match=message) as caught:
            _spread(normal(3, 1), shards)
        return str(caught.value)

    assert len(set(run_on_ranks(2, fail))) == 1
