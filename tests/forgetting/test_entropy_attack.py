import math
from itertools import pairwise

import pytest
import torch

from lqf_lightning.forgetting.entropy_attack import entropy_attack, output_entropy
from lqf_lightning.forgetting.threshold_attack import threshold_attack


def draw(samples, shift, seed):
    return torch.randn(samples, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + shift


def best_by_hand(members, others):
    """Balanced accuracy of every threshold between two scores, in both directions."""
    scores = sorted({*members.tolist(), *others.tolist()})
    found = {}
    for low, high in pairwise(scores):
        cut = (low + high) / 2
        below = ((members <= cut).double().mean() + (others > cut).double().mean()) / 2
        found[cut, True], found[cut, False] = float(below), 1 - float(below)
    return found


@pytest.mark.parametrize("size", [1.0, 1e3, 1e30])
def test_entropy_of_equal_outputs_is_log_k_and_of_one_hot_ones_zero(size):
    rows = torch.tensor([[0.0] * 5, [size * 50, 0.0, 0.0, 0.0, 0.0]], dtype=torch.float64)
    equal, one_hot = output_entropy(rows + size).tolist()
    assert equal == pytest.approx(math.log(5), rel=1e-14)
    assert 0 <= one_hot < 1e-18


def test_entropy_is_that_of_the_shares():
    logits = 2 * torch.randn(6, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shares = torch.softmax(logits / 3, 1)
    expected = -(shares * shares.log()).sum(1)
    torch.testing.assert_close(output_entropy(logits, 3.0), expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("shift", [-1.0, 1.5])
def test_the_threshold_has_the_best_balanced_accuracy_in_the_better_direction(shift):
    members, others = draw(60, 0.0, 0), draw(9, shift, 1)
    found = threshold_attack(members, others, members[:7])
    table = best_by_hand(members, others)
    assert found.balanced_accuracy == pytest.approx(max(table.values()), rel=1e-12)
    assert table[found.threshold, found.below] == pytest.approx(max(table.values()), rel=1e-12)
    assert found.below == (shift > 0)


def test_the_share_counts_the_cohort_on_the_side_of_the_members():
    members, others = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 6.0])
    cohort = torch.tensor([0.0, 3.9, 4.1, 9.0])
    assert threshold_attack(members, others, cohort).share == 0.5
    assert threshold_attack(-members, -others, -cohort).share == 0.5
    assert threshold_attack(others, members, cohort).share == 0.5
    assert threshold_attack(members, others, cohort[:2]).share == 1.0
    assert threshold_attack(others, members, cohort[:2]).share == 0.0


def test_many_members_do_not_outvote_few_others():
    # By plain accuracy everything would be called member.
    members, others = draw(900, 0.0, 0), draw(30, 2.0, 1)
    found = threshold_attack(members, others, draw(400, 2.0, 2))
    doubled = threshold_attack(members.repeat(3), others, draw(400, 2.0, 2))
    assert found.share < 0.3
    assert doubled.threshold == found.threshold


def test_the_order_of_the_samples_plays_no_part():
    groups = [draw(40, 0.0, 0), draw(15, 1.0, 1), draw(12, 0.5, 2)]
    shuffled = [group[torch.randperm(len(group), generator=torch.Generator().manual_seed(4))] for group in groups]
    assert threshold_attack(*shuffled) == threshold_attack(*groups)


def test_the_error_is_the_spread_of_the_share_over_new_samples():
    shares, errors = [], []
    for seed in range(60):
        groups = draw(80, 0.0, 3 * seed), draw(80, 1.5, 3 * seed + 1), draw(40, 0.75, 3 * seed + 2)
        found = threshold_attack(*groups, seed=seed)
        shares.append(found.share)
        errors.append(found.error)
    spread = float(torch.tensor(shares, dtype=torch.float64).std())
    mean = sum(errors) / len(errors)
    # A standard deviation of 60 has an error of 9 %; the bootstrap of a maximum is no better than half again as much.
    assert 0.75 * spread < mean < 1.5 * spread
    binomial = math.sqrt(0.25 / 40)
    assert mean > 1.05 * binomial


def test_a_unanimous_small_cohort_is_not_sure():
    found = threshold_attack(draw(30, 0.0, 0), draw(30, 50.0, 1), torch.zeros(5, dtype=torch.float64))
    assert found.share == 1.0
    assert found.error == pytest.approx(math.sqrt((7 / 9) * (2 / 9) / 9), rel=1e-9)  # the boundary has a wide gap


def test_equal_scores_are_a_coin():
    found = threshold_attack(torch.ones(5), torch.ones(3), torch.ones(4))
    assert (found.share, found.threshold, found.balanced_accuracy) == (0.5, None, 0.5)


def test_neighboring_numbers_are_told_apart():
    one = torch.tensor([1.0], dtype=torch.float64)
    following = torch.nextafter(one, one + 1)
    found = threshold_attack(one, following, torch.cat([one, following]))
    assert (found.share, found.balanced_accuracy) == (0.5, 1.0)


def test_a_model_that_treats_the_cohort_like_members_is_told_from_one_that_does_not():
    sure, unsure = 6 * torch.eye(3, dtype=torch.float64).repeat(20, 1), torch.eye(3, dtype=torch.float64).repeat(10, 1)
    assert entropy_attack(sure, unsure, sure[:9]).share == 1.0
    assert entropy_attack(sure, unsure, unsure[:9]).share == 0.0


def test_scores_that_are_no_numbers_are_refused():
    with pytest.raises(ValueError, match=r"`cohort` must be .* finite"):
        threshold_attack(torch.ones(2), torch.ones(2), torch.tensor([math.nan]))
    with pytest.raises(ValueError, match=r"data.val_fraction=0.1"):
        threshold_attack(torch.ones(2), torch.ones(0), torch.ones(2))
