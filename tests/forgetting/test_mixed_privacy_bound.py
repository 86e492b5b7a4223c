import math
from typing import Any

import pytest

from lqf_lightning.forgetting.mixed_privacy_bound import mixed_privacy_bound

PLAIN: dict[str, Any] = {
    "steps": 400, "sigma": 0.1, "batch": 32, "fraction": 0.01, "dimension": 1000,
    "c0": 0.5, "c1": 2.0, "c2": 3.0, "a": 0.1, "mu": 0.1, "beta": 1.0,
}  # fmt: skip


def test_it_is_the_formula() -> None:
    gamma = (1 - 0.1**2) ** 400
    expected = (gamma * 0.5 * (2.0 * 1e-4 / 0.01 + 1000) + 3.0 / (32 * 0.01)) / (1 - 1.1 * gamma)
    assert mixed_privacy_bound(**PLAIN) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize(
    ("name", "values"),
    [("steps", (50, 400, 10_000)), ("sigma", (0.01, 0.1, 10.0)), ("batch", (1, 32, 500))],
)
def test_it_falls_with_steps_noise_and_batch(name: str, values: tuple[float, ...]) -> None:
    bounds = [mixed_privacy_bound(**PLAIN | {name: value}) for value in values]
    assert bounds == sorted(set(bounds), reverse=True)


@pytest.mark.parametrize(("name", "values"), [("fraction", (0.01, 0.1, 1.0)), ("dimension", (1, 1000, 10**7))])
def test_it_grows_with_fraction_and_dimension(name: str, values: tuple[float, ...]) -> None:
    bounds = [mixed_privacy_bound(**PLAIN | {name: value}) for value in values]
    assert bounds == sorted(set(bounds))


def test_much_noise_leaves_the_term_of_the_dimension() -> None:
    gamma = (1 - 0.1**2) ** 400
    assert mixed_privacy_bound(**PLAIN | {"sigma": 1e9}) == pytest.approx(500 * gamma / (1 - 1.1 * gamma), rel=1e-9)


def test_many_steps_leave_the_noise_of_the_batches() -> None:
    assert mixed_privacy_bound(**PLAIN | {"steps": 10**7}) == pytest.approx(3.0 / (32 * 0.01), rel=1e-12)


def test_a_has_a_range_that_grows_with_the_steps() -> None:
    limit = (1 - 0.1**2) ** -10 - 1
    for a in (0.0, -0.1, limit * (1 + 1e-9), math.nan):
        with pytest.raises(ValueError, match=r"a must be above 0 and below 0.1057 for 10 steps.*take more steps"):
            mixed_privacy_bound(**PLAIN | {"steps": 10, "a": a})
    assert mixed_privacy_bound(**PLAIN | {"steps": 10, "a": limit * (1 - 1e-9)}) > 1e9
    with pytest.raises(ValueError, match="below inf for 10000000 steps"):
        mixed_privacy_bound(**PLAIN | {"steps": 10**7, "a": 0.0})


@pytest.mark.parametrize("name", ["steps", "sigma", "batch", "dimension", "c0", "c1", "c2", "mu"])
def test_what_must_be_positive_is_named(name: str) -> None:
    with pytest.raises(ValueError, match=f"expected positive and finite numbers, got {{'{name}': 0}}"):
        mixed_privacy_bound(**PLAIN | {name: 0})


def test_fractions_and_curvatures_have_ranges() -> None:
    for fraction in (0.0, 1.1):
        with pytest.raises(ValueError, match="fraction that is forgotten must be above 0 and at most 1"):
            mixed_privacy_bound(**PLAIN | {"fraction": fraction})
    with pytest.raises(ValueError, match=r"smoothness is never below strong convexity, got beta=0.05 and mu=0.1"):
        mixed_privacy_bound(**PLAIN | {"beta": 0.05})
