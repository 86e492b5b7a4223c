import copy
import math

import pytest

from lqf_lightning.comparison.words import QUANTITIES, interval, number, verdict
from lqf_lightning.congruence.flip_report import FlipReport


def spread(estimate, low=None, high=None):
    return {"estimate": estimate, "low": low, "high": high}


def report():
    metrics = {"accuracy_old": spread(0.5), "accuracy_new": spread(0.6), "nfr": spread(0.02, 0.01, 0.03)}
    counts = {"negative_flips": 20, "positive_flips": 1120}
    averages = {"kinds": [], "chosen": None, "least_increase": None}
    return {"split": "test", "flips": {"number": 1000, "metrics": metrics, "counts": counts}, "averages": averages}


def test_the_verdict_states_accuracy_and_flips_with_numbers():
    assert verdict(report()) == (
        "On 1,000 test images the new model raises accuracy by 10.00 points to 60.00 %. It breaks 20 answers that were "
        "right (negative flip rate 2.00 %, 1.00 to 3.00 %) and mends 1,120 that were wrong."
    )
    worse, same = report(), report()
    worse["flips"]["metrics"]["accuracy_old"] = spread(0.7)
    same["flips"]["metrics"]["accuracy_old"] = spread(0.6)
    assert "lowers accuracy by 10.00 points to 60.00 %." in verdict(worse)
    assert "the new model keeps 60.00 % accuracy." in verdict(same)


@pytest.mark.parametrize(
    ("ends", "tail"),
    [
        ((-0.02, -0.001), "-1.00 points against the new model's (-2.00 to -0.10 points)."),
        ((-0.02, 0.001), ", which may be chance."),
    ],
)
def test_a_chosen_average_is_told_with_its_uncertainty(ends, tail):
    told = report()
    result = {"metrics": {"accuracy_new": spread(0.61), "nfr": spread(0.01)}}
    told["averages"] = {
        "kinds": ["bcwi"], "chosen": {"kind": "bcwi", "share": 0.3}, "least_increase": 0.0,
        "result": result, "difference": {"nfr": spread(-0.01, *ends)},
    }  # fmt: skip
    text = verdict(told)
    assert "A weight average (bcwi, 30 % old)" in text
    assert "accuracy of 61.00 % and a negative flip rate of 1.00 %" in text
    assert text.endswith(tail)


def test_without_a_choice_the_price_of_one_is_told():
    told = report()
    told["averages"] = {"kinds": ["bcwi"], "chosen": None, "least_increase": 0.01234}
    assert "if accuracy may fall by 1.23 points (max_error_increase=0.0124)" in verdict(told)  # rounded up: it suffices
    told["averages"]["least_increase"] = 0.338 - 0.324
    assert "(max_error_increase=0.014)" in verdict(told)
    none = copy.deepcopy(told)
    none["averages"]["least_increase"] = None
    assert verdict(none).endswith("has fewer negative flips on the validation images.")


def test_every_rate_of_the_report_is_explained():
    rates = {name.removesuffix("_old").removesuffix("_new") for name in FlipReport.__dataclass_fields__} - {"number"}
    assert rates | {"accuracy"} == set(QUANTITIES)
    assert all(meaning.endswith(".") for _, meaning in QUANTITIES.values())


def test_undefined_quantities_have_neither_number_nor_interval():
    assert number("relative_nfr", math.nan) == number("nfi", None) == "undefined"
    assert interval("nfr", spread(0.1), 10) == ""
    assert interval("relative_nfr", spread(0.0, 0.0, 0.0), 10) == "0.000 to 0.000"
    assert interval("nfr", spread(0.0, 0.0, 0.0), 2) == "below 100.00 %"
