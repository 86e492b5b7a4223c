import math

import pytest
import torch
from torch import Tensor

from linear.dense_ridge import near, normal
from lqf_lightning.forgetting.flow_scrub import flow_scrub

SIZE, RIDGE = 5, 0.2
ROWS, TARGET, START = normal(30, SIZE), normal(30, seed=1), normal(SIZE, seed=2)


def loss(keep: slice) -> tuple[Tensor, Tensor]:
    """Hessian and optimum of a mean ridge loss."""
    rows, target = ROWS[keep], TARGET[keep]
    hessian = rows.mT @ rows / len(rows) + RIDGE * torch.eye(SIZE, dtype=torch.float64)
    return hessian, torch.linalg.solve(hessian, rows.mT @ target / len(rows))


ALL, OPTIMUM = loss(slice(None))
KEPT, RETRAINED = loss(slice(4, None))


def trained(hessian: Tensor, optimum: Tensor, time: float) -> Tensor:
    result: Tensor = optimum + torch.linalg.matrix_exp(-time * hessian) @ (START - optimum)
    return result


def scrub(weights: Tensor, time: float, start: Tensor | None = None) -> Tensor:
    return flow_scrub(weights, ALL @ (weights - OPTIMUM), KEPT @ (weights - RETRAINED), ALL, KEPT, time, start)


@pytest.mark.parametrize("time", [0.0, 0.1, 1.0, 5.0])
@pytest.mark.parametrize("known", [True, False])
def test_the_scrub_is_where_training_without_the_samples_would_be(time: float, known: bool) -> None:
    expected = trained(KEPT, RETRAINED, time)
    assert near(scrub(trained(ALL, OPTIMUM, time), time, START if known else None), expected, 1e-11)


def test_it_follows_training_by_small_steps() -> None:
    count, time = 20_000, 2.0
    everything, kept = START.clone(), START.clone()
    for _ in range(count):
        everything = everything - time / count * (ALL @ (everything - OPTIMUM))
        kept = kept - time / count * (KEPT @ (kept - RETRAINED))
    # One Euler step errs by (eta x)^2 / 2 per eigenvalue x; over t / eta of them by eta t x^2 / 2, and x < 3 here.
    assert near(scrub(everything, time), kept, 2 * time / count * time * 9)


def test_the_printed_sign_of_the_third_term_does_not_work() -> None:
    weights, time = trained(ALL, OPTIMUM, 1.0), 1.0
    step, kept_step = weights - OPTIMUM, weights - RETRAINED
    back = torch.linalg.matrix_exp(-time * KEPT)
    forth = back @ torch.linalg.matrix_exp(time * ALL) @ step
    right, printed = (weights + forth + sign * back @ (kept_step - step) - kept_step for sign in (1, -1))
    assert near(scrub(weights, time), right, 1e-11)
    assert float((scrub(weights, time) - printed).norm()) > 1e-2


def test_after_long_training_it_is_the_newton_step() -> None:
    newton = OPTIMUM - torch.linalg.solve(KEPT, KEPT @ (OPTIMUM - RETRAINED))
    exact = flow_scrub(OPTIMUM, torch.zeros(SIZE), KEPT @ (OPTIMUM - RETRAINED), ALL, KEPT, 1e4)
    assert near(exact, newton, 1e-12)
    for time in (1e2, 1e5):
        assert near(scrub(OPTIMUM, time, START), newton, 1e-8 if time < 1e3 else 1e-12)


def test_large_exponents_that_cancel_do_not_overflow() -> None:
    # e^{At} alone is e^{2000}; the same Hessian on both sides takes it back.
    weights = torch.ones(1, dtype=torch.float64)
    matrix = torch.full((1, 1), 2.0, dtype=torch.float64)
    assert near(flow_scrub(weights, 2 * weights, weights, matrix, matrix, 1000.0), weights + 1 - 0.5, 1e-14)


def test_a_start_that_cannot_be_retraced_is_asked_for() -> None:
    one = torch.ones(1, dtype=torch.float64)
    with pytest.raises(ValueError, match="cannot be retraced from the weights: give `start`"):
        flow_scrub(one, one, one, 2 * one[:, None], one[:, None], 1000.0)
    assert flow_scrub(one, one, one, 2 * one[:, None], one[:, None], 1000.0, one).tolist() == [0.0]


def test_times_and_curvatures_are_checked() -> None:
    one = torch.ones(1)
    for time in (-1.0, math.inf, math.nan):
        with pytest.raises(ValueError, match="training time must be finite and not negative"):
            flow_scrub(one, one, one, one[:, None], one[:, None], time)
    with pytest.raises(ValueError, match="curvature on the retained samples must be positive definite"):
        flow_scrub(one, one, one, one[:, None], -one[:, None], 1.0)
