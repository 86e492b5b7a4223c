import pytest
import torch

from linear.dense_ridge import DenseRidge
from linear.problems import SCALES, make_toy, near, refit
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.features import Features
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.local_influence import local_influence
from lqf_lightning.linear.primal import PrimalFactor

WEIGHTS = [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]
OPTIONS = {"plain": {}, "intercept": {"intercept": True}, "weights": {"intercept": True, "weights": WEIGHTS}}


@pytest.mark.parametrize("form", ["full", "diagonal", "trace", "last_layer"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_on_a_linear_model_it_is_the_derivative_in_the_weight_of_each_sample(form, options):
    """Central differences of refits in weight space; their error is that of the square of the step."""
    toy, step = make_toy(form=form, ridge=0.5, **options), 1e-5
    plain, weight = refit(toy), toy.problem.root_weight.square()[:, 0]
    excess = plain.outputs - toy.problem.target
    got = local_influence(DualFactor(toy.problem, toy.kernel, SCALES), excess, toy.cross)
    for i in range(9):
        share = step * (torch.arange(9) == i).double() * weight
        up, down = refit(toy, weight=weight + share), refit(toy, weight=weight - share)
        direction, outputs, others = (
            (getattr(up, name) - getattr(down, name)) / (2 * step) for name in ("direction", "outputs", "outputs_other")
        )
        assert near(got.weight_change[i], direction.square().sum(), 1e-7)
        assert near(got.function_change[i], others.square().sum(1).mean(), 1e-7)
        assert near(got.self_influence[i], -(excess * outputs)[i].sum(), 1e-7)


@pytest.mark.parametrize("intercept", [False, True])
def test_gradients_of_any_loss_are_pulled_through_the_gauss_newton_matrix(intercept):
    toy = make_toy(intercept=intercept, weights=WEIGHTS)
    gradient = torch.softmax(toy.problem.initial, 1) - torch.eye(3).double()[torch.arange(9) % 3]
    dense = DenseRidge(toy.problem, toy.features[0])
    pulls = torch.einsum("nc,ncp->np", gradient, dense.rows)
    moves = -dense.weight[:, None] * torch.linalg.solve(dense.hessian, pulls.T).T
    got = local_influence(DualFactor(toy.problem, toy.kernel, SCALES), gradient)
    assert near(got.weight_change, moves[:, : dense.size].square().sum(1))
    assert near(got.self_influence, -(moves * pulls).sum(1))
    assert got.function_change is None


def test_features_and_kernel_give_the_same():
    toy = make_toy(intercept=True, weights=WEIGHTS)
    gradient = toy.problem.residual
    dual = local_influence(DualFactor(toy.problem, toy.kernel, SCALES), gradient, toy.cross)
    factor = PrimalFactor(toy.problem, Features(toy.features[0]))
    primal = local_influence(factor, gradient, Features(toy.features_other[0]))
    for name in ("weight_change", "self_influence", "function_change"):
        assert near(getattr(primal, name), getattr(dual, name)), name


def test_labels_targets_and_linear_terms_of_the_problem_play_no_part():
    toy = make_toy(linear=True)
    gradient = toy.problem.residual
    plain = toy.problem.with_(target=0 * toy.problem.target, linear=None)
    first, second = (local_influence(DualFactor(p, toy.kernel, SCALES), gradient) for p in (toy.problem, plain))
    assert torch.equal(first.weight_change, second.weight_change)


def test_it_understates_what_leaving_a_sample_out_does():
    toy = make_toy(ridge=0.1)
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    excess = factor.solution().outputs - toy.problem.target
    assert bool((local_influence(factor, excess).self_influence < leave_one_out(factor).cook).all())


def test_gradients_that_do_not_fit_are_refused():
    factor = DualFactor(make_toy().problem, make_toy().kernel, SCALES)
    with pytest.raises(ValueError, match=r"expected gradients \(9, 3\), got \(9, 1\)"):
        local_influence(factor, torch.zeros(9, 1))
    with pytest.raises(ValueError, match="not finite"):
        local_influence(factor, torch.full((9, 3), torch.nan))
