import math
from collections.abc import Mapping
from typing import Any

import pytest

from deletion.report_example import good_report
from lqf_lightning.deletion.judgement import judge

NO_NOISE: dict[str, Any] = {"scrub": {"noise": None}, "bound": {"nats": None, "queries": []}}


def changed(base: dict[str, Any], change: Mapping[str, Any]) -> dict[str, Any]:
    """The report with some entries replaced, however deep they are."""
    for name, value in change.items():
        if isinstance(value, Mapping) and isinstance(base.get(name), dict):
            changed(base[name], value)
        else:
            base[name] = value
    return base


def scrubbed(**entries: Any) -> dict[str, Any]:
    return {"read_outs": {"models": {"scrubbed": entries}}}


def test_a_good_scrub_passes_without_a_flag() -> None:
    judgement = judge(good_report())
    assert judgement["flags"] == judgement["failures"] == judgement["cautions"] == []
    assert judgement["passed"]
    assert judgement["verdict"].startswith("This model is, up to 0.021 nats, one that was trained without the 40 samp")


FAILURES = [
    ({"scrub": {"verified_relative_gradient": 0.9}}, "wrong normalization"),
    ({"scrub": {"verified_relative_gradient": math.nan}}, "measured anew, is undefined"),
    ({"bound": {"queries": [{"number": 5, "nats": 0.0211}]}}, "would tell 0.0211 nats, the weights .* 0.021"),
    ({"bound": {"queries": [{"number": 5, "nats": math.nan}]}}, "contradict each other"),
    (
        {"bound": {"queries": [{"number": 1, "nats": 2e-4}, {"number": 5, "nats": 1e-4}]}},
        "more queries would tell less",
    ),
    ({"removed": {"remains": ["cache/3.npy"]}}, "Traces of the samples are still in the run folder: cache/3.npy"),
    (scrubbed(forget_error=0.6), "error on forgotten samples 60 % against 20 %"),
    (scrubbed(test_error=0.25), "error on test samples 25 % against 17 %"),
    (scrubbed(retain_error=0.06), "error on retained samples 6 % against 3 %"),
    (scrubbed(entropy_attack=0.9), "called members by entropy 90 % against 50 %"),
    (scrubbed(entropy_attack=0.1), "called members by entropy 10 % against 50 %"),
    (scrubbed(entropy_attack=math.nan), "called members by entropy undefined %"),
    (scrubbed(likelihood_ratio_auc=0.75), "likelihood ratio attack 0.75 against 0.5"),
    (scrubbed(activation_distance={"forget": 0.2}), "still 0.2 away from the retrained model's, 69 %"),
]


@pytest.mark.parametrize(("change", "reason"), FAILURES)
def test_a_failed_check_forbids_the_release(change: dict[str, Any], reason: str) -> None:
    judgement = judge(changed(good_report(), change))
    assert not judgement["passed"]
    assert judgement["verdict"].startswith("Do not release this model: 1 check failed.")
    (flag,) = judgement["failures"]
    assert judgement["flags"][0] == flag
    assert pytest.importorskip("re").search(reason, flag), flag


WITHIN = [
    {"scrub": {"verified_relative_gradient": 1.05e-3, "relative_gradient": 1e-3}},  # rounding of another order
    {"bound": {"queries": [{"number": 5, "nats": 0.021}]}},
    scrubbed(forget_error=0.1),
    scrubbed(test_error=0.2),
    scrubbed(entropy_attack=0.8),
    scrubbed(likelihood_ratio_auc=0.7),
    scrubbed(activation_distance={"forget": 0.14}),
    scrubbed(activation_distance={"forget": 0.2, "test": 0.17}),  # noise moves all answers alike
    scrubbed(likelihood_ratio_auc=None, entropy_attack=None, activation_distance=None),
]


@pytest.mark.parametrize("change", WITHIN)
def test_what_errors_of_the_comparison_explain_passes(change: dict[str, Any]) -> None:
    assert judge(changed(good_report(), change))["flags"] == []


def test_equal_distances_everywhere_are_no_excuse_without_noise() -> None:
    far = scrubbed(activation_distance={"forget": 0.2, "test": 0.17})
    judgement = judge(changed(changed(good_report(), NO_NOISE), far))
    assert "answers on the forgotten samples are still 0.2 away" in judgement["failures"][0]


CAUTIONS = [
    (NO_NOISE, "No noise was added: the bound on information is infinite"),
    ({"bound": {"nats": None}}, "no bound on the information that is left"),
    ({"bound": {"nats": 5.0}}, "The bound is weak: it leaves a test an advantage of up to 99.7 %"),
    ({"scrub": {"relative_gradient": 1e-5}}, "The solver claims a relative gradient of 1e-05, measured is 0.000102"),
    ({"scrub": {"verified_relative_gradient": None}}, "was not measured anew"),
    ({"request": {"files_gone": 30}}, "10 of the 40 image files still exist"),
    ({"removed": None}, "Nothing was deleted from the run folder"),
    ({"removed": {"not_inspected": ["notes.pkl"]}}, "Nobody looked into notes.pkl"),
    ({"read_outs": None}, "behavior of the scrubbed model was not measured"),
    (scrubbed(anamnesis_index=0.3), "in 0.3 of the steps"),
    ({"read_outs": {"counts": {"test": None}}}, ""),
]


@pytest.mark.parametrize(("change", "reason"), CAUTIONS)
def test_what_is_not_proven_is_said_but_passes(change: dict[str, Any], reason: str) -> None:
    judgement = judge(changed(good_report(), change))
    assert judgement["passed"]
    if reason:
        (flag,) = judgement["cautions"]
        assert reason in flag


def test_without_a_retrained_model_the_scores_have_no_aim() -> None:
    report = good_report()
    del report["read_outs"]["models"]["retrained"]
    assert "no retrained model to compare with" in judge(report)["cautions"][0]


def test_a_network_is_a_heuristic_and_not_a_proof() -> None:
    scrub = {"name": "ntk", "tolerance": None, "verified_relative_gradient": None, "distance_bound": None}
    judgement = judge(changed(good_report(), {"model": {"linear": False}, "scrub": scrub, "bound": {"nats": None}}))
    assert judgement["passed"]
    assert judgement["cautions"][0].startswith("Heuristic, not a proof")
    assert "nothing is proven" in judgement["verdict"]


def test_the_verdict_does_not_claim_more_than_was_shown() -> None:
    assert "without noise no amount of information is" in judge(changed(good_report(), NO_NOISE))["verdict"]
    unverified = {"scrub": {"verified_relative_gradient": None}}
    assert "not verified by a new gradient" in judge(changed(good_report(), unverified))["verdict"]


@pytest.mark.parametrize(("claimed", "why"), [(0.2, "stopped before"), (1e-4, "wrong normalization")])
def test_a_solver_that_stopped_early_is_not_blamed_for_its_normalization(claimed: float, why: str) -> None:
    numbers = {"verified_relative_gradient": 0.2, "relative_gradient": claimed, "tolerance": 1e-3}
    assert why in judge(changed(good_report(), {"scrub": numbers}))["failures"][0]
