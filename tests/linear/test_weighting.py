from dataclasses import replace

import pytest
import torch

from linear.problems import SCALES, blockwise, make_toy, near, refit, without
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.weighting import leave_one_out_derivative, validation_derivative

FORMS = ["full", "diagonal", "trace", "last_layer"]
LOSSES = ["squared", "cross_entropy"]
WEIGHTS = (1.0, 0.0, 2.5, 0.3, 1.0, 1e-6, 1.0, 0.0, 4.0) + 9 * (1.0,)
JUDGE = torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 0.5, 1.0, 3.0] + 10 * [1.0], dtype=torch.float64)
# The oracles solve normal equations of condition below 1e4 in double precision.
EXACT = 1e-8


def toy_of(form, intercept=False, weights=WEIGHTS, **options):
    toy = make_toy(form=form, intercept=intercept, weights=weights, samples=len(weights), others=8, body=2, **options)
    target = toy.problem.initial + truth(toy, 0) + 0.3 * toy.problem.target
    toy = replace(toy, problem=toy.problem.with_(target=target))
    return toy, DualFactor(toy.problem, toy.kernel, SCALES)


def truth(toy, side):
    """What there is to learn: without it no temperature would beat guessing, and all derivatives would vanish."""
    draw = torch.Generator().manual_seed(7)
    outputs = torch.zeros_like((toy.problem.initial, toy.initial_other)[side])
    for *features, columns in blockwise(toy):
        movement = torch.randn(features[0].shape[2], generator=draw, dtype=torch.float64)
        outputs[:, columns] = features[side] @ movement
    return 3 * outputs


def others(toy):
    noise = torch.randn(toy.initial_other.shape, generator=torch.Generator().manual_seed(8), dtype=torch.float64)
    return toy.initial_other, toy.initial_other + truth(toy, 1) + 10 * noise


def mean_loss(predictions, target, loss, temperature, judge=None):
    judge = torch.ones(len(target), dtype=torch.float64) if judge is None else judge
    if loss == "squared":
        losses = 0.5 * (predictions - target).square().sum(1)
    else:
        losses = torch.nn.functional.cross_entropy(predictions / temperature, target.argmax(1), reduction="none")
    return (judge * losses).sum() / judge.sum()


def held_out_refits(toy, weight):
    """Every sample as the fit to all others predicts it, by one dense solve each."""
    rows = []
    for sample in range(toy.problem.samples):
        left = torch.ones_like(weight)
        left[sample] = 0
        rows.append(refit(toy, weight=weight * left).outputs[sample])
    return torch.stack(rows)


def by_autograd(objective, weights):
    weight = torch.tensor(weights, dtype=torch.float64, requires_grad=True)
    return torch.autograd.grad(objective(weight), weight)[0]


@pytest.mark.parametrize("intercept", [False, True], ids=["plain", "intercept"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
def test_the_validation_derivative_is_that_of_refits(form, intercept, loss):
    toy, factor = toy_of(form, intercept)
    initial, target = others(toy)
    got = validation_derivative(factor, toy.cross, initial, target, loss)

    def objective(weight):
        return mean_loss(differentiable(toy, weight)[1], target, loss, got.temperature)

    assert got.loss == pytest.approx(float(objective(toy.problem.weight)), rel=1e-9)
    assert near(got.gradient, by_autograd(objective, WEIGHTS), EXACT)
    assert form == "last_layer" or float(got.gradient.abs().max()) > 1e-5  # else next to nothing is wrong


@pytest.mark.parametrize("intercept", [False, True], ids=["plain", "intercept"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("judge", [None, JUDGE], ids=["all", "some"])
def test_the_leave_one_out_derivative_is_that_of_refits(form, intercept, loss, judge):
    toy, factor = toy_of(form, intercept)
    got = leave_one_out_derivative(factor, judge, loss)

    def objective(weight):
        rows = []
        for sample in range(len(WEIGHTS)):
            left = torch.ones_like(weight)
            left[sample] = 0
            rows.append(differentiable(toy, weight * left)[0][sample])
        return mean_loss(torch.stack(rows), toy.problem.target, loss, got.temperature, judge)

    assert got.loss == pytest.approx(float(objective(toy.problem.weight)), rel=1e-9)
    assert near(got.gradient, by_autograd(objective, WEIGHTS), EXACT)
    assert form == "last_layer" or float(got.gradient.abs().max()) > 1e-5  # else next to nothing is wrong


def differentiable(toy, weight):
    """`refit`, whose solution autograd can follow."""
    found = refit(toy, weight=weight)
    return found.outputs, found.outputs_other


@pytest.mark.parametrize("loss", LOSSES)
def test_central_differences_of_refits_agree_with_the_temperature_fitted_anew(loss):
    toy, factor = toy_of("full", intercept=True)
    initial, target = others(toy)
    own = (leave_one_out_derivative(factor, loss=loss), validation_derivative(factor, toy.cross, initial, target, loss))
    step = 1e-4
    for sample in (0, 2, 4):
        values = []
        for sign in (1, -1):
            moved = list(WEIGHTS)
            moved[sample] += sign * step
            again = toy_of("full", intercept=True, weights=moved)[1]
            values.append((
                leave_one_out_derivative(again, loss=loss).loss,
                validation_derivative(again, toy.cross, initial, target, loss).loss,
            ))  # fmt: skip
        for plus, minus, derivative in zip(*values, own, strict=True):
            largest = float(derivative.gradient.abs().max())
            assert (plus - minus) / (2 * step) == pytest.approx(float(derivative.gradient[sample]), abs=1e-6 * largest)


@pytest.mark.parametrize("form", ["full", "trace"])
def test_a_samples_own_weight_does_not_move_its_own_held_out_prediction(form):
    for sample in (0, 1, 3):
        judge = torch.zeros(len(WEIGHTS), dtype=torch.float64)
        judge[sample] = 1.0
        gradient = leave_one_out_derivative(toy_of(form, intercept=True)[1], judge).gradient
        assert abs(float(gradient[sample])) < 1e-12 * float(gradient.abs().max())


def test_held_out_predictions_at_weight_zero_are_those_of_refits_without_the_sample():
    toy, factor = toy_of("full", intercept=True)
    expected = held_out_refits(toy, toy.problem.weight)
    assert near(leave_one_out(factor).prediction, expected)
    assert near(expected[1], refit(toy).outputs[1])  # absent already


def test_a_sample_outside_the_training_set_is_judged_like_one_that_enters():
    weights = [1.0] * 8 + [0.0]
    toy, factor = toy_of("full", weights=weights)
    initial, target = others(toy)
    gradient = validation_derivative(factor, toy.cross, initial, target).gradient
    step = 1e-6
    losses = []
    for last in (step, 0.0):
        refitted = refit(toy, weight=torch.tensor([*weights[:8], last], dtype=torch.float64))
        losses.append(mean_loss(refitted.outputs_other, target, "squared", None))
    assert float((losses[0] - losses[1]) / step) == pytest.approx(float(gradient[8]), rel=1e-4)
    without_it = without(toy, [8]).outputs_other
    assert near(refit(toy).outputs_other, without_it)


def test_an_integer_weight_is_a_number_of_copies():
    toy, factor = toy_of("full", intercept=True, weights=[2.0, 1.0, 1.0, 3.0, 1.0])
    copies = refit(toy, [0, 0, 1, 2, 3, 3, 3, 4], weight=torch.ones(5, dtype=torch.float64))
    assert near(factor.solution().outputs, copies.outputs)


def test_linear_terms_and_odd_judges_are_refused():
    toy = make_toy(linear=True)
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    with pytest.raises(ValueError, match="without linear terms"):
        leave_one_out_derivative(factor)
    factor = toy_of("full")[1]
    for judge in (torch.ones(3), torch.zeros(18), -torch.ones(18)):
        with pytest.raises(ValueError, match="`judge` must be"):
            leave_one_out_derivative(factor, judge)
    with pytest.raises(ValueError, match="squared or cross_entropy, got 'hinge'"):
        leave_one_out_derivative(factor, loss="hinge")
