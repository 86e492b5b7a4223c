import math

import pytest
import torch

from lqf_lightning.forgetting.attack_area import attack_area


def draw(number, shift, seed):
    return torch.randn(number, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def test_it_is_the_share_of_pairs_in_the_right_order():
    positive, negative = torch.tensor([1.0, 2.0, 2.0, 5.0]), torch.tensor([2.0, 0.0, 4.0])
    pairs = [(p > n) + 0.5 * (p == n) for p in positive.tolist() for n in negative.tolist()]
    assert attack_area(positive, negative)[0] == pytest.approx(sum(pairs) / 12, rel=1e-14)
    assert attack_area(negative, positive)[0] == pytest.approx(1 - sum(pairs) / 12, rel=1e-14)


def test_the_error_is_the_spread_over_new_samples():
    areas, errors = zip(*(attack_area(draw(25, 1.0, 2 * s), draw(60, 0.0, 2 * s + 1)) for s in range(400)), strict=True)
    spread = float(torch.tensor(areas, dtype=torch.float64).std())  # known to 4 %
    assert sum(errors) / 400 == pytest.approx(spread, rel=0.15)
    expected = 0.5 * math.erfc(-0.5)  # Phi(1 / sqrt 2)
    assert sum(areas) / 400 == pytest.approx(expected, abs=4 * spread / 20)


def test_groups_that_do_not_overlap_keep_an_error():
    assert attack_area(draw(10, 50.0, 0), draw(40, 0.0, 1)) == (1.0, 0.05)


def test_a_single_sample_has_the_largest_possible_error():
    area, error = attack_area(torch.tensor([0.5]), torch.tensor([0.0, 1.0, 2.0, 3.0]))
    assert area == 0.25
    assert error == 0.5
    assert attack_area(torch.tensor([1.5]), torch.tensor([0.0, 1.0, 2.0, 3.0]))[1] == 0.5


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="`negative`"):
        attack_area(torch.ones(3), torch.ones(0))
