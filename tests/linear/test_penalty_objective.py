import math

import pytest
import torch

from linear.problems import make_toy
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.penalty_objective import PenaltyObjective

EVERY = torch.ones(9, dtype=torch.bool)


@pytest.mark.parametrize("criterion", ["cross_entropy", "press"])
def test_gradients_are_finite_differences_of_values_prior_included(criterion):
    toy = make_toy(form="trace", intercept=True, body=5)
    target = toy.problem.initial + 3 * torch.cat([toy.features[0, :, 0, -2:], torch.zeros(9, 1)], 1)
    objective = PenaltyObjective(toy.problem.with_(target=target), toy.kernel, criterion, EVERY, None)
    point, h = torch.tensor([-2.0, 3.0], dtype=torch.float64), 1e-4
    here = objective(point)
    slopes = [(objective(point + h * e).value - objective(point - h * e).value) / (2 * h) for e in torch.eye(2)]
    assert here.gradient.tolist() == pytest.approx(slopes, rel=1e-5)
    spread = (2.5 / 2.5) ** 2 * 2 / (2 * 9)  # both are 2.5 from their mean
    assert here.result is not None
    loss = here.result.loss if criterion == "cross_entropy" else 1.5 * math.log(here.result.loss)
    assert here.value == pytest.approx(loss + spread)


def test_points_are_logarithms_of_scaled_diagonals_over_the_ridge():
    toy = make_toy(form="trace")
    means = {name: float(group[0].diagonal().mean()) for name, group in toy.kernel.groups.items()}
    objective = PenaltyObjective(toy.problem, toy.kernel, "press", EVERY, None)
    point = objective.position({name: 0.5 / mean for name, mean in means.items()}, ridge=0.1)
    assert point.tolist() == pytest.approx(
        [math.log(5)] * 2
    )  # two groups of .5 each: the ridge is a tenth of their sum
    assert objective.before(0.1).tolist() == pytest.approx(point.tolist())


def test_where_the_system_is_indefinite_the_value_is_infinite():
    toy = make_toy(form="trace")
    odd = Kernel({"odd": 2 * torch.eye(9).flip(0)[None] + torch.eye(9)}, 3, "trace")
    objective = PenaltyObjective(toy.problem, odd, "press", EVERY, None)
    step = objective(objective.before(0.1))
    assert (step.value, step.result, step.informative, step.gradient.tolist()) == (math.inf, None, False, [0.0])
    assert objective(objective.before(10.0)).value < math.inf


def test_the_prior_is_about_the_parts_that_are_expected():
    toy = make_toy(form="trace", intercept=True, ridge=0.3)
    names = list(toy.kernel.groups)
    expected = {name: 1.0 + position for position, name in enumerate(names)}
    plain = PenaltyObjective(toy.problem, toy.kernel, "press", EVERY, None)
    told = PenaltyObjective(toy.problem, toy.kernel, "press", EVERY, None, expected)
    point = torch.linspace(-1, 1, len(names), dtype=torch.float64)
    shift = torch.tensor([expected[name] for name in names], dtype=torch.float64).log()
    away, apart = point - shift - (point - shift).mean(), point - point.mean()
    difference = float((away.square().sum() - apart.square().sum()) / (2 * 6.25 * int(EVERY.sum())))
    assert told(point).value - plain(point).value == pytest.approx(difference, rel=1e-9)
    assert (
        told(point).gradient - plain(point).gradient - (away - apart) / (6.25 * int(EVERY.sum()))
    ).abs().max() < 1e-12
    shares = told.before(0.1).softmax(0) / plain.before(0.1).softmax(0)
    assert (shares / shares[0] - torch.tensor(list(expected.values()), dtype=torch.float64)).abs().max() < 1e-12
    with pytest.raises(ValueError, match="positive part of the trace for each of"):
        PenaltyObjective(toy.problem, toy.kernel, "press", EVERY, None, {names[0]: 1.0})


def test_below_the_least_ridge_proportions_alone_count():
    toy = make_toy(form="trace", intercept=True, ridge=0.3)
    free = PenaltyObjective(toy.problem, toy.kernel, "press", EVERY, None)
    held = PenaltyObjective(toy.problem, toy.kernel, "press", EVERY, None, least_ridge=0.05)
    inside = free.before(0.1)
    assert held(inside).value == free(inside).value
    beyond = inside + torch.tensor([3.0, 4.0], dtype=torch.float64)
    step = held(beyond)
    assert float(step.point.exp().sum()) == pytest.approx(1 / 0.05)
    assert float(step.point[1] - step.point[0]) == pytest.approx(float(beyond[1] - beyond[0]))
    assert step.value == pytest.approx(free(step.point).value, rel=1e-12)
    slopes = [(held(beyond + 1e-4 * e).value - held(beyond - 1e-4 * e).value) / 2e-4 for e in torch.eye(2).double()]
    assert step.gradient.tolist() == pytest.approx(slopes, rel=1e-5)
    assert float(step.gradient.sum()) == pytest.approx(0.0, abs=1e-12)  # a common factor changes nothing there
