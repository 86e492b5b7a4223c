import math

import pytest
import torch

from lqf_lightning.deletion.report_words import advantage, bound_in_words, percent, quantity, read_out


@pytest.mark.parametrize("nats", [1e-6, 0.02, 0.5, 2.0, 10.0])
def test_the_advantage_is_never_below_that_of_the_best_test(nats: float) -> None:
    # Gaussians of variance 1 at a distance m differ by m^2 / 2 nats, and the best test cuts half way.
    distance = math.sqrt(2 * nats)
    best = math.erf(distance / 2 / math.sqrt(2))
    assert best < advantage(nats) <= 1


def test_the_advantage_bounds_the_variation_of_any_distributions() -> None:
    torch.manual_seed(0)
    for _ in range(200):
        first, second = (3 * torch.randn(2, 4, dtype=torch.float64)).softmax(1)
        nats = float((first * (first / second).log()).sum())
        assert 0.5 * float((first - second).abs().sum()) <= advantage(nats)


def test_small_bounds_follow_pinsker_and_large_ones_stay_below_certainty() -> None:
    assert advantage(0.02) == pytest.approx(math.sqrt(0.01))
    assert math.sqrt(4.0 / 2) > 1 > advantage(4.0)
    assert advantage(math.inf) == 1
    with pytest.raises(ValueError, match="never negative, got nan nats"):
        advantage(math.nan)


def test_the_words_hold_the_numbers() -> None:
    words = bound_in_words(0.02, {"kind": "isotropic", "sigma": 1e-3})
    assert "At most 0.02 nats (0.0289 bits)" in words
    assert "advantage of at most 10 %" in words
    assert "right in at most 55 % of cases, where guessing is right in 50 %" in words


def test_no_bound_is_not_written_as_a_number() -> None:
    noise = {"kind": "isotropic", "sigma": 1e-3}
    assert "the bound is infinite" in bound_in_words(0.02, None)
    for missing in (None, math.inf, math.nan):
        assert bound_in_words(missing, noise).startswith("There is no bound")


def test_numbers_that_are_missing_or_odd_are_words() -> None:
    assert percent(None) == read_out("test_loss", None) == "not measured"
    assert quantity(math.inf) == "infinite"
    assert quantity(math.nan) == "undefined"
    assert quantity(123456.7) == "123,457"
    assert quantity("by hand") == "by hand"
