import math
from dataclasses import asdict

import pytest
import torch

from lqf_lightning.congruence.flip_report import flip_rates, flip_report

# Old error, new error, negative flip rate and printed relative rate in percent (Yan et al., CVPR 2021).
SAME_ARCHITECTURE = [  # table 2a, ImageNet
    (30.24, 30.29, 6.44, 30.48),
    (30.24, 29.34, 5.72, 27.95),
    (30.24, 29.66, 6.39, 30.88),
    (30.24, 30.63, 2.50, 11.70),
    (30.24, 30.47, 2.35, 11.06),
    (26.07, 25.98, 1.70, 8.85),
    (40.69, 41.06, 7.77, 31.91),  # table 2b, iNaturalist
    (40.69, 45.47, 11.07, 41.05),
    (40.69, 41.81, 2.83, 11.41),
    (40.69, 41.78, 2.71, 10.94),
    (35.68, 35.42, 2.01, 8.82),
]
WEIGHTS = [  # table 3, without the two rows of table 2a
    (30.24, 31.52, 5.25, 23.88),
    (30.24, 31.12, 3.90, 17.96),
    (30.24, 30.59, 2.75, 12.89),
    (30.24, 30.79, 2.73, 12.71),
    (30.24, 30.44, 2.39, 11.26),
    (30.24, 33.55, 6.94, 29.65),
]
OTHER_ARCHITECTURE = [  # table 4
    (30.24, 25.85, 4.89, 27.12),
    (30.24, 24.41, 3.78, 22.20),
    (30.24, 26.32, 2.90, 15.79),
    (30.24, 26.53, 2.92, 15.78),
    (26.07, 22.20, 1.64, 9.99),
    (30.24, 22.86, 4.03, 25.24),
    (30.24, 21.60, 3.28, 21.76),
    (30.24, 23.52, 2.50, 15.24),
    (30.24, 23.83, 2.56, 15.40),
]
SMALL_SCALE = [  # another implementation, CIFAR-10 and CIFAR-100
    (4.90, 4.85, 1.83, 39.68),
    (4.90, 4.67, 1.37, 30.85),
    (4.90, 4.58, 1.34, 30.77),
    (22.45, 22.50, 5.92, 33.93),
    (22.45, 20.91, 4.03, 24.85),
    (22.45, 20.78, 3.68, 22.84),
]
# Table 5, where the printed relative rate does not follow from the three others.
MISPRINTED = [
    (28.58, 23.65, 3.98, 19.47, 23.56),
    (28.45, 25.20, 2.89, 15.84, 16.03),
    (19.30, 23.65, 8.05, 41.90, 42.18),
]


def counts_of(error_old, error_new, nfr, number=1_000_000):
    old, new, negative = (round(percent * number / 100) for percent in (error_old, error_new, nfr))
    both_wrong = new - negative
    return torch.tensor([[both_wrong, old - both_wrong], [negative, number - old - negative]])


def of_rounding(row):
    """Largest error of the relative rate if all four numbers are rounded to 0.01."""
    error_old, error_new, nfr, relative = row
    return 0.0051 + relative * 0.0051 * (1 / nfr + 1 / error_new + 1 / (100 - error_old))


def random_tables(number=300):
    generator = torch.Generator().manual_seed(0)
    sizes = torch.randint(1, 60, (number, 1, 1), generator=generator)
    return torch.randint(0, 1000, (number, 2, 2), generator=generator) % sizes  # small ones often have a zero


@pytest.mark.parametrize("row", [*SAME_ARCHITECTURE, *WEIGHTS, *OTHER_ARCHITECTURE, *SMALL_SCALE])
def test_published_relative_rates_follow_from_the_published_counts(row):
    error_old, error_new, nfr, printed = row
    table = counts_of(error_old, error_new, nfr)
    assert (table >= 0).all()
    report = flip_report(table)
    assert (report.error_old, report.error_new, report.nfr) == pytest.approx(
        (error_old / 100, error_new / 100, nfr / 100), abs=1e-12
    )
    assert 100 * report.relative_nfr == pytest.approx(printed, abs=of_rounding(row))


@pytest.mark.parametrize("row", MISPRINTED)
def test_three_rows_of_table_5_are_misprinted(row):
    *rates, printed, recomputed = row
    relative = 100 * flip_report(counts_of(*rates)).relative_nfr
    assert relative == pytest.approx(recomputed, abs=0.01)
    assert abs(relative - printed) > 4 * of_rounding((*rates, recomputed))


def test_a_forgotten_error_costs_positive_flips():
    report = flip_report(counts_of(30.24, 30.47, 2.35))
    assert 100 * report.pfr == pytest.approx(2.12, abs=1e-9)


def test_every_flip_explains_a_change_of_error():
    for table in random_tables():
        (_, positive), (negative, _) = table.tolist()
        old_wrong, new_wrong = int(table[0].sum()), int(table[:, 0].sum())
        assert negative - positive == new_wrong - old_wrong
        assert max(0, new_wrong - old_wrong) <= negative <= min(int(table.sum()) - old_wrong, new_wrong)


def test_rates_are_counts_over_their_wholes():
    for table in random_tables():
        (both_wrong, positive), (negative, both_right) = table.tolist()
        number = int(table.sum())
        report = flip_report(table)
        assert report.number == number
        wholes = {
            "error_old": (both_wrong + positive, number),
            "error_new": (both_wrong + negative, number),
            "nfr": (negative, number),
            "pfr": (positive, number),
            "nfi": (negative, both_wrong + negative),
            "pfi": (positive, positive + both_right),
            "relative_nfr": (negative * number, (negative + both_right) * (both_wrong + negative)),
        }
        for name, (part, whole) in wholes.items():
            expected = part / whole if whole else math.nan
            assert getattr(report, name) == pytest.approx(expected, rel=1e-14, nan_ok=True), (name, table)


def test_impact_and_relative_rate_are_one_quantity_in_two_units():
    for table in random_tables():
        report = flip_report(table)
        if report.relative_nfr == report.relative_nfr:
            assert report.nfi == pytest.approx(report.relative_nfr * (1 - report.error_old), rel=1e-13)
            assert report.nfr == pytest.approx(report.nfi * report.error_new, rel=1e-13)


def test_the_same_model_again_flips_nothing():
    report = flip_report(torch.tensor([[3, 0], [0, 5]]))
    assert (report.nfr, report.pfr, report.relative_nfr, report.nfi, report.pfi) == (0, 0, 0, 0, 0)


@pytest.mark.parametrize(
    ("table", "undefined"),
    [
        ([[0, 0], [0, 0]], {"error_old", "error_new", "nfr", "pfr", "relative_nfr", "nfi", "pfi"}),
        ([[0, 2], [0, 3]], {"relative_nfr", "nfi"}),  # the new model makes no error
        ([[2, 3], [0, 0]], {"relative_nfr"}),  # the old model is never right
        ([[2, 0], [3, 0]], {"pfi"}),  # the new model is never right
        ([[2, 1], [3, 4]], set()),
    ],
)
def test_what_is_not_defined_is_not_a_number(table, undefined):
    report = asdict(flip_report(torch.tensor(table)))
    assert {name for name, value in report.items() if value != value} == undefined


def test_independent_models_have_a_relative_rate_of_one():
    generator = torch.Generator().manual_seed(0)
    number, error_old, error_new = 200_000, 0.3, 0.2
    old_right = torch.rand(number, generator=generator) > error_old
    new_right = torch.rand(number, generator=generator) > error_new
    table = torch.bincount(2 * old_right.long() + new_right.long(), minlength=4).view(2, 2)
    # The share of the old model's right samples among the new model's errors, over its share among all.
    deviation = math.sqrt(error_old / (1 - error_old) / (number * error_new))
    assert flip_report(table).relative_nfr == pytest.approx(1, abs=4 * deviation)


def test_many_tables_give_what_each_gives():
    tables = random_tables(12).view(3, 4, 2, 2)
    rates = flip_rates(tables)
    for row in range(3):
        for column in range(4):
            single = asdict(flip_report(tables[row, column]))
            for name, values in rates.items():
                assert values.shape == (3, 4)
                assert float(values[row, column]) == pytest.approx(single[name], rel=1e-15, nan_ok=True)


@pytest.mark.parametrize("shape", [(4,), (2, 3), (3, 2, 2)])
def test_other_shapes_are_refused(shape):
    with pytest.raises(ValueError, match=r"expected \(2, 2\): \[old right\?, new right\?\]"):
        flip_report(torch.zeros(shape, dtype=torch.int64))
    if shape != (3, 2, 2):
        with pytest.raises(ValueError, match=r"expected \(\.\.\., 2, 2\)"):
            flip_rates(torch.zeros(shape, dtype=torch.int64))
