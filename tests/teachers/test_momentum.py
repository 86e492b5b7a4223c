import math

import pytest
from torch import nn

from lqf_lightning.teachers import EMANTeacher, MomentumSchedule


@pytest.mark.parametrize("start", [0.0, 0.5, 0.98, 0.996])
@pytest.mark.parametrize("total", [4, 1000])
def test_a_cosine_starts_at_the_momentum_is_half_way_at_half_time_and_ends_at_one(start: float, total: int) -> None:
    schedule = MomentumSchedule(start, "cosine")
    assert schedule.at(0, total) == pytest.approx(start, abs=1e-15)
    assert schedule.at(total // 2, total) == pytest.approx((1 + start) / 2, abs=1e-15)
    assert schedule.at(total, total) == 1
    values = [schedule.at(t, total) for t in range(total + 1)]
    assert values == sorted(values)


def test_a_cosine_has_the_published_values() -> None:
    values = [MomentumSchedule(0.98, "cosine").at(t, 400) for t in (0, 100, 200, 300)]
    assert values == pytest.approx([0.98, 0.98293, 0.99, 0.99707], abs=5e-6)


def test_a_cosine_is_one_minus_a_share_of_what_is_missing() -> None:
    """By the half-angle formula: 1 - (1 - m) cos^2(pi t / 2T)."""
    for t in range(8):
        expected = 1 - 0.1 * math.cos(math.pi * t / 14) ** 2
        assert MomentumSchedule(0.9, "cosine").at(t, 7) == pytest.approx(expected, abs=1e-15)


def test_a_run_longer_than_planned_stays_at_one() -> None:
    assert MomentumSchedule(0.9, "cosine").at(11, 10) == 1
    assert 0 <= MomentumSchedule(0.9, "cosine").at(0, 0) <= 1


@pytest.mark.parametrize("total", [None, 10])
def test_a_constant_needs_no_end_and_heeds_none(total: int | None) -> None:
    assert {MomentumSchedule(0.7).at(t, total) for t in range(20)} == {0.7}


@pytest.mark.parametrize("shape", ["constant", "cosine"])
def test_a_warm_up_keeps_less_until_it_reaches_the_schedule(shape: str) -> None:
    plain, warm = MomentumSchedule(0.9, shape), MomentumSchedule(0.9, shape, warmup=True)
    for t in range(200):
        assert warm.at(t, 200) == min(plain.at(t, 200), (1 + t) / (10 + t))
    assert warm.at(0, 200) == 0.1
    assert warm.at(79, 200) < plain.at(79, 200)
    assert MomentumSchedule(0.9, warmup=True).at(80) == 0.9  # 81 / 90


@pytest.mark.parametrize("momentum", [-0.1, 1.1, float("nan"), float("inf")])
def test_a_momentum_that_is_no_share_is_refused(momentum: float) -> None:
    with pytest.raises(ValueError, match=r"in \[0, 1\], got .*Set method.momentum="):
        MomentumSchedule(momentum)


def test_another_shape_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got 'linear'. Set method.momentum_schedule=constant"):
        MomentumSchedule(0.9, "linear")


def test_a_cosine_without_an_end_is_refused() -> None:
    with pytest.raises(ValueError, match=r"set `teacher\.total_updates`"):
        MomentumSchedule(0.9, "cosine").at(0)


def test_a_teacher_takes_the_values_one_after_the_other() -> None:
    teacher = EMANTeacher(nn.Linear(1, 1), MomentumSchedule(0.9, "cosine", warmup=True))
    teacher.total_updates = 5
    assert [teacher.update() for _ in range(5)] == [teacher.momentum.at(t, 5) for t in range(5)]
    assert teacher.updates == 5
