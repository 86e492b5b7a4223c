import math
from itertools import pairwise

import pytest
import torch

from lqf_lightning.forgetting.attack_area import attack_area
from lqf_lightning.forgetting.best_attack import (
    auc_of_information,
    best_attack_auc,
    best_query_attack_auc,
    single_query_attack_auc,
)

SIGMA = 0.3


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def likelihood_ratio_area(change, covariance, draws=4000):
    """Monte Carlo area, and its error, of the likelihood ratio of N(0, C) and N(change, C)."""
    lower = torch.linalg.cholesky(covariance)
    weights = torch.cholesky_solve(change[:, None], lower)[:, 0]
    first, second = (normal(draws, len(change), seed=seed) @ lower.T for seed in (1, 2))
    return attack_area((first + change) @ weights, second @ weights)


@pytest.mark.parametrize("distance", [0.05, 0.4, 1.1])
def test_the_area_is_that_of_the_likelihood_ratio_on_samples(distance):
    change = normal(6)
    change *= distance / change.norm()
    area, error = likelihood_ratio_area(change, SIGMA**2 * torch.eye(6, dtype=torch.float64))
    assert best_attack_auc(distance, SIGMA) == pytest.approx(area, abs=4 * error)


def test_another_direction_does_worse():
    change = torch.tensor([0.4, 0.0], dtype=torch.float64)
    first, second = (SIGMA * normal(4000, 2, seed=seed) for seed in (1, 2))
    direction = torch.tensor([1.0, 1.0], dtype=torch.float64)
    area, error = attack_area((first + change) @ direction, second @ direction)
    assert area + 4 * error < best_attack_auc(0.4, SIGMA)


def test_equal_models_are_never_told_apart():
    assert best_attack_auc(0.0, 1e-9) == 0.5
    assert best_query_attack_auc(torch.zeros(3), torch.eye(3), 1e-9) == 0.5
    assert auc_of_information(0.0) == 0.5


def test_a_bound_in_nats_is_a_bound_on_the_area():
    # KL = d^2 / (2 sigma^2) for equal noise
    assert auc_of_information(0.4**2 / (2 * SIGMA**2)) == pytest.approx(best_attack_auc(0.4, SIGMA), rel=1e-12)


def test_answers_to_queries_are_told_apart_as_their_likelihood_ratio_says():
    rows, moved = normal(4, 9, seed=3), 0.05 * normal(9, seed=4)
    change, gram = rows @ moved, rows @ rows.T
    area, error = likelihood_ratio_area(change, SIGMA**2 * gram)
    assert best_query_attack_auc(change, gram, SIGMA) == pytest.approx(area, abs=4 * error)


def test_more_queries_never_tell_less_and_never_more_than_the_weights():
    rows, moved = normal(14, 9, seed=3), 0.1 * normal(9, seed=4)
    areas = [best_query_attack_auc(rows[:q] @ moved, rows[:q] @ rows[:q].T, SIGMA) for q in range(1, 15)]
    white_box = best_attack_auc(float(moved.norm()), SIGMA)
    assert all(later >= earlier - 1e-12 for earlier, later in pairwise(areas))
    assert areas[3] < white_box - 1e-3
    assert areas[8:] == pytest.approx([white_box] * 6, rel=1e-9)  # nine rows span all weights, repetitions add nothing


def test_a_single_query_is_a_set_of_one():
    rows, moved = normal(5, 9, seed=3), 0.1 * normal(9, seed=4)
    change, gram = rows @ moved, rows @ rows.T
    single = single_query_attack_auc(change, gram.diagonal(), SIGMA)
    for query in range(5):
        alone = best_query_attack_auc(change[query : query + 1], gram[query : query + 1, query : query + 1], SIGMA)
        assert single[query].item() == pytest.approx(alone, rel=1e-12)


def test_what_the_noise_does_not_reach_gives_the_model_away():
    gram = torch.tensor([[1.0, 0.0], [0.0, 0.0]], dtype=torch.float64)
    assert best_query_attack_auc(torch.tensor([0.1, 0.1], dtype=torch.float64), gram, SIGMA) == 1.0
    assert best_query_attack_auc(torch.tensor([0.1, 0.0], dtype=torch.float64), gram, SIGMA) < 0.7
    alone = single_query_attack_auc(torch.tensor([0.1, 0.0]), torch.zeros(2), SIGMA)
    assert alone.tolist() == [1.0, 0.5]


@pytest.mark.parametrize("sigma", [0.0, -1.0, math.inf, math.nan])
def test_releases_without_noise_are_refused(sigma):
    with pytest.raises(ValueError, match=r"sigma=0\.001"):
        best_attack_auc(0.1, sigma)


def test_odd_numbers_are_refused():
    with pytest.raises(ValueError, match="distance"):
        best_attack_auc(-0.1, SIGMA)
    with pytest.raises(ValueError, match="divergence"):
        auc_of_information(math.nan)
    with pytest.raises(ValueError, match=r"\(q, q\)"):
        best_query_attack_auc(torch.zeros(3), torch.eye(2), SIGMA)
