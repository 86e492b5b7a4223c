import math

import pytest
import torch

from deletion.report_example import good_report
from lqf_lightning.deletion.behavior_rules import ERRORS, behavior_failures, counts_of, share_error


@pytest.mark.parametrize(("share", "count"), [(0.03, 400), (0.3, 50), (0.5, 7), (0.0, 20)])
def test_equal_models_are_rarely_told_apart(share: float, count: int) -> None:
    draws = 4000
    binomial = torch.distributions.Binomial(count, torch.tensor(share))
    torch.manual_seed(0)
    first, second = (binomial.sample((draws,)) / count for _ in range(2))
    apart = sum(
        abs(one - other) > ERRORS * share_error(one, other, count)
        for one, other in zip(first.tolist(), second.tolist(), strict=True)
    )
    # Two-sided 0.27 % for a normal difference; the smoothing makes the discrete one rarer. 4.5 errors of the count.
    expected = 0.0027 * draws
    assert apart <= expected + 4.5 * math.sqrt(expected)


def test_the_error_is_that_of_a_difference_of_shares_of_many_samples() -> None:
    expected = math.sqrt(2 * 0.25 * 0.75 / 10**6)
    assert share_error(0.24, 0.26, 10**6) == pytest.approx(expected, rel=1e-4)


def test_shares_without_failures_have_an_error() -> None:
    assert share_error(0.0, 0.0, 10) > 0.05
    assert share_error(1.0, 1.0, 10) == pytest.approx(share_error(0.0, 0.0, 10))


def test_without_counts_the_numbers_of_the_request_hold_and_tests_are_not_judged() -> None:
    report = good_report()
    del report["read_outs"]["counts"]
    assert counts_of(report) == {"retain": 3960, "forget": 40, "test": None}
    report["read_outs"]["models"]["scrubbed"] |= {"test_error": 0.9, "forget_error": 0.9}
    (flag,) = behavior_failures(report)
    assert "forgotten samples 90 %" in flag
