import pytest
import torch

from lqf_lightning.congruence.flip_counts import FlipCounts
from ranks import run_on_ranks

NEW, OLD = ["ant", "bee", "cow", "dog", "elk"], ["dog", "ant", "cow", "yak"]


def draw(number, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def guess(right, classes):
        at_random = torch.randint(0, classes, (number,), generator=generator)
        return torch.where(torch.rand(number, generator=generator) < 0.5, right, at_random)

    target = torch.randint(0, len(NEW), (number,), generator=generator)
    old_target = torch.tensor([OLD.index(name) if name in OLD else 3 for name in NEW])[target]
    return guess(target, len(NEW)), guess(old_target, len(OLD)), target


def by_hand(new, old, target):
    """Counts by names, one sample after the other."""
    table, flips, unshared = torch.zeros(5, 2, 2).long(), torch.zeros(5, 5).long(), 0
    for n, o, t in zip(new.tolist(), old.tolist(), target.tolist(), strict=True):
        if NEW[t] not in OLD:
            unshared += 1
            continue
        old_right, new_right = OLD[o] == NEW[t], n == t
        table[t, int(old_right), int(new_right)] += 1
        if old_right and not new_right:
            flips[t, n] += 1
    return table, flips, unshared


def counted(*batches, **options):
    counts = FlipCounts(NEW, OLD, **options)
    for batch in batches:
        counts.update(*batch)
    return counts.compute()


def same(tally, reference):
    return (
        torch.equal(tally.table, reference[0])
        and torch.equal(tally.negative_flips, reference[1])
        and int(tally.unshared) == reference[2]
    )


def test_counts_are_those_made_by_hand():
    data = draw(200)
    reference = by_hand(*data)
    assert reference[2] > 0
    assert reference[0].view(5, 4).ne(0).sum() == 12  # three shared classes, every cell
    for size in (1, 7, 200):
        assert same(counted(*zip(*(column.split(size) for column in data), strict=True)), reference)


def test_rates_leave_out_the_classes_that_only_the_new_model_knows():
    bee = NEW.index("bee")
    data = [torch.tensor([0, bee, bee, 2]), torch.tensor([1, 0, 1, 0]), torch.tensor([0, bee, bee, 2])]
    report = counted(data).report()
    assert (report.number, report.error_old, report.error_new, report.pfr) == (2, 0.5, 0.0, 0.5)
    per_class = counted(data).class_reports()
    assert [r.number for r in per_class] == [1, 0, 1, 0, 0]
    assert per_class[2].pfr == 1.0
    assert per_class[bee].nfr != per_class[bee].nfr


def test_a_new_class_may_replace_a_right_answer():
    dog, elk = NEW.index("dog"), NEW.index("elk")
    tally = counted((torch.tensor([elk]), torch.tensor([OLD.index("dog")]), torch.tensor([dog])))
    assert tally.negative_flips.nonzero().tolist() == [[dog, elk]]
    assert tally.report().nfr == 1.0


def test_negative_flips_add_up_to_those_of_the_table():
    tally = counted(draw(300, seed=1))
    assert torch.equal(tally.negative_flips.sum(1), tally.table[:, 1, 0])
    assert tally.negative_flips.diagonal().eq(0).all()


def test_without_the_matrix_the_rest_is_the_same():
    data = draw(50)
    tally = counted(data, matrix=False)
    assert tally.negative_flips is None
    assert torch.equal(tally.table, by_hand(*data)[0])


def test_no_samples_are_no_error():
    nothing = torch.zeros(0, dtype=torch.int64)
    report = counted((nothing, nothing, nothing)).report()
    assert report.number == 0
    assert report.nfr != report.nfr


def test_reset_starts_over():
    counts, data = FlipCounts(NEW, OLD), draw(20)
    counts.update(*data)
    counts.compute()
    counts.reset()
    counts.update(*data)
    assert same(counts.compute(), by_hand(*data))


@pytest.mark.parametrize("world_size", [1, 2, 3])
@pytest.mark.parametrize("empty", [0, 1])
def test_ranks_count_as_one_process_does(world_size, empty):
    data = draw(41)
    order = torch.arange(41)
    cuts = {1: [order], 2: [order[:30], order[30:]], 3: [order[:5], order[5:12], order[12:]]}[world_size]
    if empty and world_size > 1:
        cuts = [order[:0], *cuts[:-2], torch.cat(cuts[-2:])]  # the first process has none

    def compute():
        import torch.distributed as dist

        own = cuts[dist.get_rank()]
        halves = [own[: len(own) // 2], own[len(own) // 2 :]]
        return tuple(counted(*([column[half] for column in data] for half in halves)))

    for table, flips, unshared in run_on_ranks(world_size, compute):
        reference = by_hand(*data)
        assert table.dtype == torch.int64
        assert torch.equal(table, reference[0])
        assert torch.equal(flips, reference[1])
        assert int(unshared) == reference[2]


def test_a_process_that_was_never_given_a_batch_takes_part():
    data = draw(9)

    def compute():
        import warnings

        import torch.distributed as dist

        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # torchmetrics says so, on the first process
            return tuple(counted(*([data] if dist.get_rank() == 0 else [])))

    for table, flips, unshared in run_on_ranks(2, compute):
        reference = by_hand(*data)
        assert torch.equal(table, reference[0])
        assert torch.equal(flips, reference[1])
        assert int(unshared) == reference[2]


@pytest.mark.parametrize("which", [0, 1, 2])
def test_columns_are_refused(which):
    data = [torch.zeros(3, dtype=torch.int64)] * 3
    data[which] = data[which][:, None]
    with pytest.raises(ValueError, match=r"got shapes .*\(3, 1\).*expected the same \(B,\)"):
        FlipCounts(NEW, OLD).update(*data)


def test_logits_are_refused():
    position = torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match=r"of logits take argmax\(-1\)"):
        FlipCounts(NEW, OLD).update(torch.zeros(3, 5), position, position)
    with pytest.raises(TypeError, match=r"`old_prediction` holds torch.float32"):
        FlipCounts(NEW, OLD).update(position, position.float(), position)
    with pytest.raises(TypeError, match=r"`new_prediction` holds torch.bool"):
        FlipCounts(NEW, OLD).update(position.bool(), position, position)


@pytest.mark.parametrize(
    ("which", "value", "name", "last"),
    [(0, 5, "new_prediction", 4), (1, 4, "old_prediction", 3), (2, 5, "target", 4), (2, -1, "target", 4)],
)
def test_positions_outside_the_classes_are_refused(which, value, name, last):
    data = [torch.zeros(2, dtype=torch.int64) for _ in range(3)]
    data[which][1] = value
    with pytest.raises(ValueError, match=rf"`{name}` holds {value}, expected class positions from 0 to {last}"):
        FlipCounts(NEW, OLD).update(*data)


def test_a_name_that_repeats_is_refused():
    with pytest.raises(ValueError, match=r"the old model has several classes of the same name: \['a'\]"):
        FlipCounts(["a", "b"], ["a", "b", "a"])
    with pytest.raises(ValueError, match=r"the new model has several classes"):
        FlipCounts(["a", "a"], ["a"])


def test_models_without_a_shared_class_are_refused():
    with pytest.raises(ValueError, match="share no name"):
        FlipCounts(["a"], ["b"])
