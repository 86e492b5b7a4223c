import math

import pytest
import torch

from lqf_lightning.congruence.flip_report import flip_rates
from lqf_lightning.congruence.intervals import compare_flips, flip_intervals, joint_table

TABLE = torch.tensor([[120, 40], [30, 310]])
JOINT = torch.tensor([[[60, 15], [10, 35]], [[12, 28], [20, 220]]])
WIDTH = 2 * 1.959964  # of a 95 % interval of a normal distribution, in standard deviations


def samples_of(table):
    """Rows of [is right?] per model, one for each counted sample."""
    cells = torch.cartesian_prod(*[torch.arange(2)] * table.ndim)
    return cells.repeat_interleave(table.flatten(), 0)


def resampled(table, times, seed):
    """Counts of samples drawn one by one with replacement."""
    rows = samples_of(table)
    code = (rows * 2 ** torch.arange(table.ndim - 1, -1, -1)).sum(1)
    drawn = code[torch.randint(0, len(code), (times, len(code)), generator=torch.Generator().manual_seed(seed))]
    return torch.stack([(drawn == cell).sum(1) for cell in range(table.numel())], 1).view(times, *table.shape)


def agree(interval, values, whole):
    # A quantile of 20 000 normal draws has a deviation of sqrt(q (1 - q) / 20 000) / density = 0.019; rates come in
    # steps of one sample.
    tolerance = 4 * math.sqrt(2) * 0.019 * float(values.std()) + 1 / whole
    low, high = values.quantile(torch.tensor([0.025, 0.975]).double())
    return abs(interval.low - low) <= tolerance and abs(interval.high - high) <= tolerance


def test_intervals_are_those_of_samples_drawn_one_by_one():
    intervals = flip_intervals(TABLE, resamples=20_000)
    drawn = flip_rates(resampled(TABLE, 20_000, seed=1))
    wholes = {"error_old": 500, "error_new": 500, "nfr": 500, "pfr": 500, "relative_nfr": 102, "nfi": 150, "pfi": 350}
    for name, whole in wholes.items():
        assert float(intervals[name].estimate) == float(flip_rates(TABLE)[name])
        assert agree(intervals[name], drawn[name], whole), name


@pytest.mark.parametrize(
    ("name", "variance"),
    [("nfr", 0.06 * 0.94 / 500), ("error_new", 0.3 * 0.7 / 500), ("nfi", 0.2 * 0.8 / 150)],
)
def test_widths_are_those_of_binomial_shares(name, variance):
    interval = flip_intervals(TABLE, resamples=20_000)[name]
    assert float(interval.high - interval.low) == pytest.approx(WIDTH * math.sqrt(variance), rel=0.04)


def test_a_lower_level_is_narrower():
    wide, narrow = (flip_intervals(TABLE, level=level)["nfr"] for level in (0.95, 0.5))
    assert wide.low < narrow.low < narrow.estimate < narrow.high < wide.high
    # 0.674 deviations to each side hold half of a normal distribution.
    assert float((narrow.high - narrow.low) / (wide.high - wide.low)) == pytest.approx(0.6745 / 1.96, rel=0.1)


def test_intervals_cover_the_truth_about_as_often_as_they_say():
    cells = torch.tensor([0.25, 0.08, 0.07, 0.60], dtype=torch.float64)
    drawn = torch.multinomial(cells.expand(400, 4), 600, True, generator=torch.Generator().manual_seed(0))
    tables = torch.stack([(drawn == cell).sum(1) for cell in range(4)], 1).view(400, 2, 2)
    truth = flip_rates(cells.view(2, 2))
    for name, interval in flip_intervals(tables, resamples=400).items():
        covered = ((interval.low <= truth[name]) & (truth[name] <= interval.high)).double().mean()
        # 400 tables: a deviation of 0.011; percentile intervals of 600 samples fall a little short of 0.95.
        assert 0.91 <= covered <= 0.985, name


def test_the_same_seed_draws_the_same_and_leaves_the_global_generator_alone():
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second, other = flip_intervals(TABLE), flip_intervals(TABLE), flip_intervals(TABLE, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(first[name].low, second[name].low) for name in first)
    assert any(not torch.equal(first[name].low, other[name].low) for name in first)


def test_classes_have_intervals_of_their_own():
    tables = torch.stack([TABLE, 10 * TABLE, torch.zeros(2, 2).long(), TABLE.T]).view(2, 2, 2, 2)
    intervals = flip_intervals(tables, resamples=4000)
    for position, table in ((0, TABLE), (1, 10 * TABLE), (3, TABLE.T)):
        alone = flip_intervals(table, resamples=4000)
        for name, interval in intervals.items():
            assert interval.low.shape == (2, 2)
            width = float(alone[name].high - alone[name].low)
            assert float(interval.estimate.view(-1)[position]) == float(alone[name].estimate)
            assert float(interval.low.view(-1)[position]) == pytest.approx(float(alone[name].low), abs=0.06 * width)
            assert float(interval.high.view(-1)[position]) == pytest.approx(float(alone[name].high), abs=0.06 * width)
    nothing = intervals["nfr"]
    assert nothing.low[1, 0].isnan()
    assert nothing.undefined[1, 0] == 1


def test_no_classes_give_no_intervals():
    assert flip_intervals(torch.zeros(0, 2, 2).long())["nfr"].low.shape == (0,)


def test_resamples_are_drawn_in_parts_of_bounded_size(monkeypatch):
    monkeypatch.setattr("lqf_lightning.congruence.intervals._VALUES_AT_ONCE", 2000)
    tables = torch.stack([TABLE] * 5)
    interval = flip_intervals(tables, resamples=1000)["nfr"]
    assert interval.low.shape == (5,)
    assert len(set(interval.low.tolist()) | set(interval.high.tolist())) > 2  # every part draws anew


def test_rarely_undefined_resamples_are_left_out_and_reported():
    table = torch.tensor([[2, 40], [3, 55]])  # no error in (1 - 0.05)^100 = 0.6 % of the resamples
    interval = flip_intervals(table, resamples=20_000)["relative_nfr"]
    assert float(interval.undefined) == pytest.approx(0.95**100, abs=5 * math.sqrt(0.006 / 20_000))
    values = flip_rates(resampled(table, 20_000, seed=1))["relative_nfr"]
    low, high = values[~values.isnan()].quantile(torch.tensor([0.025, 0.975]).double())
    assert (float(interval.low), float(interval.high)) == pytest.approx((float(low), float(high)), abs=0.08)


def test_too_many_undefined_resamples_leave_no_interval():
    table = torch.tensor([[1, 40], [1, 58]])  # no error in 13 %
    strict, lenient = flip_intervals(table)["nfi"], flip_intervals(table, tolerated=0.2)["nfi"]
    assert float(strict.undefined) == pytest.approx(0.98**100, abs=0.03)
    assert strict.low.isnan()
    assert strict.high.isnan()
    assert float(strict.estimate) == 0.5
    assert (float(lenient.low), float(lenient.high)) == (0.0, 1.0)


def test_a_count_of_zero_has_no_width():
    interval = flip_intervals(torch.tensor([[10, 5], [0, 85]]))["nfr"]
    assert (float(interval.low), float(interval.high)) == (0.0, 0.0)


def test_differences_are_those_of_samples_drawn_one_by_one():
    intervals = compare_flips(JOINT, resamples=20_000)
    assert set(intervals) == {"error_new", "nfr", "pfr", "relative_nfr", "nfi", "pfi"}
    drawn = resampled(JOINT, 20_000, seed=1)
    first, second = flip_rates(drawn.sum(-1)), flip_rates(drawn.sum(-2))
    for name, interval in intervals.items():
        assert agree(interval, second[name] - first[name], 100 if "relative" in name or "fi" in name else 400), name


def test_a_difference_of_errors_has_the_variance_of_paired_answers():
    number = int(JOINT.sum())
    first_only, second_only = int(JOINT[:, 1, 0].sum()), int(JOINT[:, 0, 1].sum())
    mean = (first_only - second_only) / number  # the second model errs where only the first is right
    variance = ((first_only + second_only) / number - mean**2) / number
    interval = compare_flips(JOINT, resamples=20_000)["error_new"]
    assert float(interval.estimate) == pytest.approx(mean, rel=1e-13)
    assert float(interval.high - interval.low) == pytest.approx(WIDTH * math.sqrt(variance), rel=0.04)


def test_a_model_does_not_differ_from_itself():
    rows = samples_of(TABLE).bool()
    table = joint_table(rows[:, 0], rows[:, 1], rows[:, 1])
    for interval in compare_flips(table).values():
        assert (float(interval.estimate), float(interval.low), float(interval.high)) == (0.0, 0.0, 0.0)


def test_the_joint_table_counts_all_three_models():
    rows = samples_of(JOINT).bool()
    shuffled = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    assert torch.equal(joint_table(*shuffled.T), JOINT)
    assert int(joint_table(*shuffled[:0].T).sum()) == 0


def test_tables_that_hold_no_counts_are_refused():
    for bad in (TABLE.double(), -TABLE, torch.zeros(2, 3).long()):
        with pytest.raises(ValueError, match=r"expected counts \(\.\.\., 2, 2\)"):
            flip_intervals(bad)
    with pytest.raises(ValueError, match=r"expected counts \(\.\.\., 2, 2, 2\)"):
        compare_flips(TABLE)


@pytest.mark.parametrize(
    "option", [{"level": 1.0}, {"level": 0.0}, {"resamples": 0}, {"tolerated": -0.1}, {"tolerated": math.nan}]
)
def test_options_outside_their_range_are_refused(option):
    with pytest.raises(ValueError, match=next(iter(option))):
        flip_intervals(TABLE, **option)


def test_answers_of_other_shapes_or_types_are_refused():
    right = torch.ones(3, dtype=torch.bool)
    for bad in (right[:2], right[:, None], right.long()):
        with pytest.raises(ValueError, match="expected three boolean tensors"):
            joint_table(right, right, bad)
