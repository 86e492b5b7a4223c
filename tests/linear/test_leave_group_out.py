import pytest
import torch

from linear.problems import SCALES, make_toy, near, refit, without
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.leave_group_out import leave_group_out, remove_group
from lqf_lightning.linear.leave_one_out import leave_one_out

FORMS = ["full", "diagonal", "trace", "last_layer"]
GROUPS = [torch.tensor([0, 4, 7]), torch.tensor([2]), torch.tensor([8, 1])]
OPTIONS = {
    "plain": {},
    "weights": {"intercept": True, "weights": [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "linear": {"intercept": True, "linear": True, "weights": [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]},
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_a_removed_group_is_that_of_a_refit_in_weight_space(form, ridge, outputs, options):
    toy = make_toy(form=form, ridge=ridge, outputs=outputs, **options)
    full, result = refit(toy), leave_group_out(DualFactor(toy.problem, toy.kernel, SCALES), GROUPS, toy.cross)
    assert result.function_change is not None
    for g, group in enumerate(GROUPS):
        part = without(toy, group.tolist())
        assert near(result.residual[g], (toy.problem.target - part.outputs)[group])
        assert near(result.weight_change[g], (full.direction - part.direction).square().sum())
        assert near(result.intercept_change[g], full.intercept - part.intercept)
        assert near(result.function_change[g], (full.outputs_other - part.outputs_other).square().sum(1).mean())


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_groups_of_one_are_leave_one_out(form, options):
    toy = make_toy(form=form, **options)
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    single = leave_one_out(factor, toy.cross)
    groups = leave_group_out(factor, list(torch.arange(9).split(1)), toy.cross)
    assert near(torch.cat(groups.residual), single.residual)
    for name in ("weight_change", "intercept_change", "cook", "function_change"):
        assert near(getattr(groups, name), getattr(single, name)), name


@pytest.mark.parametrize("form", FORMS)
def test_the_change_of_a_removal_is_the_movement_of_weights_and_outputs(form):
    toy = make_toy(form=form, intercept=True)
    full, part = refit(toy), without(toy, [3, 5])
    removal = remove_group(DualFactor(toy.problem, toy.kernel, SCALES), torch.tensor([3, 5]))
    assert near(removal.output_change(toy.cross), full.outputs_other - part.outputs_other)
    columns = torch.arange(3).reshape(-1, toy.kernel.coupled)
    for b, change in enumerate(full.direction - part.direction):
        features = toy.features[b % len(toy.features)]
        assert near(torch.einsum("ncp,nc->p", features, removal.coefficients[:, columns[b]]), change)


def test_without_an_intercept_all_samples_may_go():
    toy = make_toy()
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    removal = remove_group(factor, torch.arange(9))
    assert near(removal.residual, toy.problem.residual)
    assert near(removal.coefficients, factor.solution().coefficients)


def test_groups_that_cannot_be_removed_are_refused():
    toy = make_toy(intercept=True)
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    with pytest.raises(ValueError, match="holds all that have a weight"):
        remove_group(factor, torch.arange(9))
    for odd in ([1, 1], [9], [-1], []):
        with pytest.raises(ValueError, match="different positions below 9"):
            remove_group(factor, torch.tensor(odd, dtype=torch.long))
    with pytest.raises(ValueError, match="no group"):
        leave_group_out(factor, [])
    linear = make_toy(linear=True, weights=[1, 0, 1, 1, 1, 1, 1, 1, 1])
    with pytest.raises(ValueError, match="weight 0 with a linear term"):
        remove_group(DualFactor(linear.problem, linear.kernel, SCALES), torch.tensor([1, 2]))


def test_progress_sees_every_group():
    toy, seen = make_toy(), []
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    leave_group_out(factor, GROUPS, watch=lambda groups: (seen.append(1) or g for g in groups))
    assert len(seen) == 3
