import math

import pytest
import torch

from lqf_lightning.linear import QuadraticProblem, mean_of_ridge, ridge_of_mean

INITIAL, TARGET = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[2.0, 2.0], [0.0, 1.0]])


def build(**changes) -> QuadraticProblem:
    return QuadraticProblem(**{"initial": INITIAL, "target": TARGET, "ridge": 0.5, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"target": TARGET[:1]}, r"got \(2, 2\) and \(1, 2\)"),
        ({"initial": INITIAL[:0], "target": TARGET[:0]}, r"got \(0, 2\)"),
        ({"ridge": 0.0}, "positive and finite, got 0"),
        ({"ridge": math.nan}, "positive and finite, got nan"),
        ({"weight": torch.tensor([1.0, -1.0])}, "not negative"),
        ({"weight": torch.ones(3)}, r"must be \(2,\)"),
        ({"linear": torch.ones(2, 3)}, r"are \(2, 3\), expected \(2, 2\)"),
        ({"initial": torch.tensor([[math.nan, 0.0], [0.0, 0.0]])}, "`initial` holds values that are not finite"),
        ({"target": torch.full((2, 2), math.inf)}, "`target` holds values that are not finite"),
        ({"weight": torch.zeros(2), "intercept": True}, "at least one sample of positive weight"),
    ],
)
def test_what_is_no_problem_is_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        build(**changes)


def test_residual_and_roots_are_in_double_precision():
    problem = build(weight=torch.tensor([4.0, 0.0]))
    assert torch.equal(problem.residual, torch.tensor([[1.0, 0.0], [-3.0, -3.0]], dtype=torch.float64))
    assert torch.equal(problem.root_weight, torch.tensor([[2.0], [0.0]], dtype=torch.float64))


def test_a_mean_loss_has_the_minimizer_of_the_converted_sum():
    generator = torch.Generator().manual_seed(0)
    rows, y = (torch.randn(7, k, generator=generator, dtype=torch.float64) for k in (3, 1))
    mu, eye = 0.3, torch.eye(3, dtype=torch.float64)
    by_mean = torch.linalg.solve(rows.T @ rows / 7 + mu * eye, rows.T @ y / 7)
    by_sum = torch.linalg.solve(rows.T @ rows + ridge_of_mean(mu, 7) * eye, rows.T @ y)
    assert torch.allclose(by_mean, by_sum, rtol=1e-12)
    assert mean_of_ridge(ridge_of_mean(mu, 7), 7) == pytest.approx(mu, rel=1e-15)
