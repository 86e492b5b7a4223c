import pytest

from lqf_lightning.comparison.average_choice import AveragePoint, choose_average, least_increase


def point(share, error, nfr, kind="bcwi"):
    return AveragePoint(kind, share, error, nfr, pfr=0.0, relative_nfr=0.0)


NEW = point(0.0, 0.2, 0.10, "new")


def test_the_fewest_negative_flips_win_among_those_that_are_accurate_enough():
    points = [point(0.1, 0.2, 0.08), point(0.3, 0.2, 0.05), point(0.5, 0.21, 0.02), point(0.9, 0.4, 0.0)]
    assert choose_average(points, NEW).share == 0.3
    assert choose_average(points, NEW, 0.01).share == 0.5
    assert choose_average(points, NEW, 1.0).share == 0.9


def test_the_limit_itself_is_allowed_whatever_rounding_does():
    assert choose_average([point(0.5, 0.1 + 0.2, 0.0)], point(0, 0.3, 0.1, "new")).share == 0.5
    assert choose_average([point(0.5, 0.201, 0.0)], NEW) is None


def test_the_old_model_is_no_choice():
    assert choose_average([point(1.0, 0.1, 0.0)], NEW) is None
    assert least_increase([point(1.0, 0.1, 0.0)], NEW) is None


def test_the_new_model_stays_where_nothing_is_better():
    assert choose_average([point(0.0, 0.2, 0.1), point(0.5, 0.2, 0.1), point(0.7, 0.1, 0.11)], NEW) is None


def test_ties_go_to_the_more_accurate_then_to_the_smaller_share():
    points = [point(0.6, 0.15, 0.05), point(0.4, 0.12, 0.05), point(0.2, 0.12, 0.05, "fisher"), point(0.1, 0.18, 0.05)]
    assert (choose_average(points, NEW).share, choose_average(points, NEW).kind) == (0.2, "fisher")
    assert choose_average([point(0.5, 0.19, 0.1)], NEW).share == 0.5  # as many flips, and more accurate


def test_a_soup_without_the_old_model_is_a_choice():
    assert choose_average([point(0.0, 0.19, 0.08, "soup")], NEW).kind == "soup"


def test_the_least_increase_is_one_with_which_a_choice_is_found():
    points = [point(0.1, 0.26, 0.08), point(0.3, 0.24, 0.09), point(0.5, 0.22, 0.12)]
    increase = least_increase(points, NEW)
    assert increase == pytest.approx(0.04)
    assert choose_average(points, NEW, increase).share == 0.3
    assert choose_average(points, NEW, increase - 1e-6) is None
    assert least_increase([point(0.5, 0.1, 0.1)], NEW) is None
    assert least_increase([point(0.5, 0.1, 0.05)], NEW) == 0
