import pytest
import torch

from lqf_lightning.linear.training_rule import TrainingRule


def run(rule, curvature, steps=400):
    """A quadratic 1/2 x w^2 under torch's own optimizer; how far w is from 0 at the end, from 1."""
    w = torch.ones(1, dtype=torch.float64, requires_grad=True)
    rate = float(rule.rates[0])
    optimizer = torch.optim.SGD([w], lr=rate, momentum=rule.momentum, nesterov=rule.nesterov)
    for _ in range(steps):
        optimizer.zero_grad()
        (0.5 * curvature * w.square()).sum().backward()
        optimizer.step()
    return float(w.detach().abs())


@pytest.mark.parametrize(("momentum", "nesterov"), [(0.0, False), (0.5, False), (0.9, False), (0.5, True), (0.9, True)])
def test_rates_below_the_longest_converge_and_rates_above_diverge(momentum, nesterov):
    bound = TrainingRule(torch.ones(1), momentum, nesterov).longest_rate(3.0)
    below, above = (
        TrainingRule(torch.tensor([share * bound], dtype=torch.float64), momentum, nesterov) for share in (0.98, 1.02)
    )
    assert run(below, 3.0) < 0.1
    assert run(above, 3.0) > 10
    below.refuse_divergence(3.0)
    with pytest.raises(ValueError, match=r"Set method\.optimizer\.lr="):
        above.refuse_divergence(3.0)


def test_the_highest_rate_of_a_schedule_decides():
    with pytest.raises(ValueError, match="diverges"):
        TrainingRule(torch.tensor([0.1, 2.1, 0.1])).refuse_divergence(1.0)


@pytest.mark.parametrize(
    ("rates", "momentum", "nesterov"),
    [([], 0.0, False), ([-0.1], 0.0, False), ([float("nan")], 0.0, False), ([0.1], 1.0, False), ([0.1], 0.0, True)],
)
def test_rules_that_are_none_are_refused(rates, momentum, nesterov):
    with pytest.raises(ValueError, match=r"rate|momentum"):
        TrainingRule(torch.tensor(rates), momentum, nesterov)
