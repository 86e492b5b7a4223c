import pytest
import torch

from lqf_lightning.data.sample_ledger import SampleLedger
from lqf_lightning.linear import current_reducer
from ranks import run_on_ranks

SIZE, NAMES = 11, ("loss", "correct")
# What each of three ranks notes, batch by batch: uneven, one rank with an empty batch, and sample 4 on all of them.
SHARES = [
    [[7, 0, 4], [9, 4]],
    [[4, 1], []],
    [[10, 2, 3, 4], [5]],
]


def values(index, rank=0):
    """What a rank says about a sample; about sample 4, which all have, each says something else."""
    index = torch.tensor(index, dtype=torch.int64)
    loss = index * 0.5 + torch.where(index == 4, 1.0 + rank, 0.0)
    return {"loss": loss, "correct": (index % 2).float()}


def note(ledger, batches, rank):
    for batch in batches:
        ledger.add(torch.tensor(batch, dtype=torch.int64), **values(batch, rank))


def shares_of(rank, world_size):
    """The work of three ranks, done by fewer."""
    return [(owner, batches) for owner, batches in enumerate(SHARES) if owner % world_size == rank]


def expected():
    said = {}
    for rank, batches in enumerate(SHARES):
        for batch in batches:
            for place, sample in enumerate(batch):
                said.setdefault(sample, []).append([float(column[place]) for column in values(batch, rank).values()])
    loss = [sum(v[0] for v in said[i]) / len(said[i]) if i in said else float("nan") for i in range(SIZE)]
    correct = [sum(v[1] for v in said[i]) / len(said[i]) if i in said else float("nan") for i in range(SIZE)]
    return loss, correct, [len(said.get(i, [])) for i in range(SIZE)]


def found(ledger):
    columns = ledger.reduce()
    return columns["loss"].tolist(), columns["correct"].tolist(), columns.count.tolist()


def same(got):
    return all(one == pytest.approx(other, nan_ok=True) for one, other in zip(got, expected(), strict=True))


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_samples_that_several_ranks_have_seen_count_once(world_size):
    def work():
        ledger = SampleLedger(SIZE, NAMES)
        for owner, batches in shares_of(current_reducer().rank, world_size):
            note(ledger, batches, owner)
        first = found(ledger)
        return first, found(ledger)  # looking changes nothing

    for first, second in run_on_ranks(world_size, work):
        assert same(first)
        assert same(second)
    assert expected()[2][4] == 4  # else the test above would not see that it counts once


@pytest.mark.parametrize(("before", "after"), [(2, 3), (3, 1), (1, 2), (3, 2)])
def test_a_ledger_goes_on_in_the_middle_of_an_epoch_on_any_number_of_ranks(before, after):
    def begin():
        ledger = SampleLedger(SIZE, NAMES)
        for owner, batches in shares_of(current_reducer().rank, before):
            note(ledger, batches[:1], owner)
        state = ledger.state()
        note(ledger, [[0, 0, 0]], 0)  # what comes after a checkpoint is not in it
        return state

    def go_on(state):
        ledger = SampleLedger(SIZE, NAMES)
        note(ledger, [[8]], 0)  # replaced by the state
        ledger.restore(state)
        for owner, batches in shares_of(current_reducer().rank, after):
            note(ledger, batches[1:], owner)
        return found(ledger)

    states = run_on_ranks(before, begin)
    assert all(torch.equal(state["sums"], states[0]["sums"]) for state in states)  # whoever writes the checkpoint
    assert all(same(got) for got in run_on_ranks(after, go_on, states[-1]))


def test_samples_added_to_the_manifest_since_the_checkpoint_follow_at_the_end():
    small, large = SampleLedger(2, NAMES), SampleLedger(3, NAMES)
    note(small, [[1]], 0)
    large.restore(small.state())
    assert large.reduce().count.tolist() == [0, 1, 0]
    with pytest.raises(ValueError, match=r"of 3 samples; expected loss, correct of at most 2. Set ckpt_path=null"):
        small.restore(large.state())
    with pytest.raises(ValueError, match="holds loss, correct of 3 samples; expected loss of at most 5"):
        SampleLedger(5, ["loss"]).restore(large.state())


def test_a_cleared_ledger_is_empty():
    ledger = SampleLedger(SIZE, NAMES)
    note(ledger, SHARES[0], 0)
    ledger.clear()
    assert ledger.reduce().count.sum() == 0


@pytest.mark.parametrize("names", [["loss"], ["loss", "correct", "margin"], []])
def test_every_column_is_given_and_no_other(names):
    with pytest.raises(ValueError, match="a ledger of loss, correct got"):
        SampleLedger(SIZE, NAMES).add(torch.tensor([1]), **{name: torch.ones(1) for name in names})
