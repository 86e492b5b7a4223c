from itertools import combinations

import pytest
import torch

from lqf_lightning.forgetting.release_test import release_test


def draw(releases, queries, seed, shift=0.0):
    noise = torch.randn(releases, queries, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return noise + shift


def energy(first, second):
    """Pair by pair."""
    between = sum(float((a - b).norm()) for a in first for b in second) / (len(first) * len(second))

    def within(rows):
        pairs = list(combinations(range(len(rows)), 2))
        return sum(float((rows[i] - rows[j]).norm()) for i, j in pairs) / len(pairs)

    return 2 * between - within(first) - within(second)


def test_the_statistic_is_the_energy_distance():
    first, second = draw(5, 3, 0), draw(4, 3, 1, 0.5)
    assert release_test(first, second).statistic == pytest.approx(energy(first, second), rel=1e-12)


def test_the_p_value_is_the_share_of_all_groupings():
    first, second = draw(4, 2, 2), draw(3, 2, 3, 0.8)
    rows, found = torch.cat([first, second]), energy(first, second)
    groupings = list(combinations(range(7), 4))
    values = [energy(rows[list(own)], rows[[i for i in range(7) if i not in own]]) for own in groupings]
    exact = sum(value >= found - 1e-12 for value in values) / len(values)
    drawn = release_test(first, second, permutations=4000).p_value
    assert drawn == pytest.approx(exact, abs=4 * (exact * (1 - exact) / 4000) ** 0.5)


def test_equal_models_are_found_different_as_rarely_as_promised():
    # Answers of a release move together: one number shared by all queries, as noise on the weights does.
    def releases(seed):
        return draw(8, 1, seed) + 0.1 * draw(8, 20, seed + 1000)

    values = [release_test(releases(2 * s), releases(2 * s + 1), permutations=99, seed=s).p_value for s in range(200)]
    rejected = sum(value <= 0.1 for value in values)
    assert 5 <= rejected <= 37  # 20 of 200, four standard deviations of 4.2 either way


def test_a_shifted_model_is_found():
    assert release_test(draw(20, 30, 0), draw(20, 30, 1, 1.0)).p_value == 0.001


def test_another_spread_is_found():
    assert release_test(draw(20, 10, 0), 3 * draw(20, 10, 1)).p_value < 0.01


def test_identical_releases_are_not_told_apart():
    assert release_test(torch.ones(3, 2), torch.ones(4, 2)).p_value == 1.0


def test_single_releases_are_refused():
    with pytest.raises(ValueError, match="at least two"):
        release_test(torch.ones(1, 2), torch.ones(4, 2))
    with pytest.raises(ValueError, match="permutations=999"):
        release_test(torch.ones(3, 2), torch.ones(4, 2), permutations=0)
