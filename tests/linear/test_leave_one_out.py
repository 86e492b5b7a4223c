from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from linear.problems import SCALES, Refit, Toy, make_toy, near, refit, without
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.leave_one_out import LeaveOneOut, leave_one_out, relabel
from lqf_lightning.linear.problem import QuadraticProblem

FORMS = ["full", "diagonal", "trace", "last_layer"]
WEIGHTS = [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]
OPTIONS = {
    "plain": {},
    "intercept": {"intercept": True},
    "linear": {"linear": True, "weights": [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "weights": {"weights": WEIGHTS},
    "all": {"intercept": True, "linear": True, "weights": [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "intercept, weights": {"intercept": True, "weights": WEIGHTS},
}


def removed(toy: Toy, cross: bool = True) -> LeaveOneOut:
    return leave_one_out(DualFactor(toy.problem, toy.kernel, SCALES), toy.cross if cross else None)


def curve(toy: Toy, change: Tensor, intercept: Tensor) -> float:
    """The quadratic form of the Hessian of the objective at a change of weights and intercept."""
    weight, total = toy.problem.root_weight.square(), toy.problem.ridge * float(change.square().sum())
    columns = torch.arange(toy.problem.outputs).reshape(len(change), -1)
    for b, direction in enumerate(change):
        moved = toy.features[b % len(toy.features)] @ direction + intercept[columns[b]]
        total += float((weight * moved.square()).sum())
    return total


def expected(toy: Toy) -> dict[str, Tensor]:
    full, parts = refit(toy), [without(toy, [i]) for i in range(toy.problem.samples)]

    def each(of: Callable[[Refit], Tensor]) -> Tensor:
        return torch.tensor([of(part) for part in parts], dtype=torch.float64)

    prediction = torch.stack([part.outputs[i] for i, part in enumerate(parts)])
    return {
        "prediction": prediction,
        "residual": toy.problem.target - prediction,
        "weight_change": each(lambda part: (full.direction - part.direction).square().sum()),
        "function_change": each(lambda part: (full.outputs_other - part.outputs_other).square().sum(1).mean()),
        "intercept_change": torch.stack([full.intercept - part.intercept for part in parts]),
        "cook": each(lambda part: curve(toy, full.direction - part.direction, full.intercept - part.intercept)),
    }


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("outputs", [1, 3])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_removal_is_that_of_a_refit_in_weight_space(form, ridge, outputs, options):
    toy = make_toy(form=form, ridge=ridge, outputs=outputs, **options)
    result = removed(toy)
    for name, value in expected(toy).items():
        assert near(getattr(result, name), value), name


@pytest.mark.parametrize("body", [2, 60])
def test_fewer_and_more_weights_than_equations(body):
    toy = make_toy(body=body, ridge=1e-2, intercept=True)
    result, wanted = removed(toy), expected(toy)
    assert near(result.residual, wanted["residual"])
    assert near(result.weight_change, wanted["weight_change"])


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("outputs", [1, 3])
def test_the_inverse_of_the_smaller_system_gives_the_same(intercept, outputs):
    """Woodbury: F11 - C (A22 + C^T A12)^-1 C^T with C = F11 A12, turned round to take rows away."""
    toy = make_toy(intercept=intercept, outputs=outputs, ridge=0.1)
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    rows = torch.arange(9 * outputs).reshape(9, outputs)
    for i, gone in enumerate(rows):
        kept = torch.cat([rows[:i].flatten(), rows[i + 1 :].flatten()])
        inverse = factor.inverse[0]
        down = inverse[kept][:, kept] - inverse[kept][:, gone] @ torch.linalg.solve(
            inverse[gone][:, gone], inverse[gone][:, kept]
        )
        small = down @ toy.problem.residual.flatten()[kept]
        moved = factor.system.matrix[0][:, kept] @ small
        level = (toy.problem.residual.flatten() - moved)[kept].reshape(8, outputs).mean(0) if intercept else 0.0
        prediction = toy.problem.initial[i] + moved[gone] + level
        assert near(leave_one_out(factor).prediction[i], prediction)


def test_centering_beforehand_makes_leave_one_out_collapse_and_the_intercept_inside_does_not():
    toy = make_toy(intercept=True, ridge=1e-5, outputs=1, body=60)
    center = torch.eye(9, dtype=torch.float64) - 1 / 9
    matrix = center @ toy.kernel.total(SCALES)[0] @ center
    centered = QuadraticProblem(torch.zeros(9, 1), center @ toy.problem.residual, 1e-5)
    collapsed = leave_one_out(DualFactor(centered, Kernel({"all": matrix[None]}, 1))).residual
    wanted = expected(toy)["residual"]
    assert float(collapsed.norm()) < 1e-4 * float(wanted.norm())
    assert near(removed(toy).residual, wanted)


@pytest.mark.parametrize("form", FORMS)
def test_leverages_lie_between_zero_and_one_and_add_up_to_the_degrees_of_freedom(form):
    toy = make_toy(form=form, intercept=True, weights=WEIGHTS)
    factor = DualFactor(toy.problem, toy.kernel, SCALES)
    leverage = leave_one_out(factor).leverage
    values = torch.linalg.eigvalsh(leverage)
    assert float(values.min()) > -1e-12
    assert float(values.max()) < 1
    assert factor.system.replicas * float(values.sum()) == pytest.approx(factor.degrees_of_freedom, rel=1e-9)


def test_the_residual_is_the_ordinary_one_amplified_by_the_leverage():
    toy = make_toy(ridge=0.5)
    result = removed(toy)
    ordinary = toy.problem.target - refit(toy).outputs
    amplified = torch.linalg.solve(torch.eye(3) - result.leverage[:, 0], ordinary.unsqueeze(2)).squeeze(2)
    assert near(result.residual, amplified)
    assert near(result.cook, torch.einsum("nc,ncd,nd->n", result.residual, result.leverage[:, 0], result.residual))


def test_an_influence_function_is_the_derivative_in_the_weight_of_a_sample():
    toy, step = make_toy(ridge=0.5, intercept=True), 1e-5
    ordinary, inverse = toy.problem.target - refit(toy).outputs, DualFactor(toy.problem, toy.kernel, SCALES).inverse[0]
    for i in range(3):
        more = step * (torch.arange(9) == i).double()
        up, down = refit(toy, weight=1 + more), refit(toy, weight=1 - more)
        slope = (up.direction - down.direction)[0] / (2 * step)
        coefficients = inverse[:, 3 * i : 3 * i + 3] @ ordinary[i]
        assert near(torch.einsum("ncp,nc->p", toy.features[0], coefficients.reshape(9, 3)), slope, 1e-7)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [OPTIONS["intercept, weights"], OPTIONS["all"]])
def test_a_new_label_of_one_sample_gives_what_solving_again_gives(form, options):
    toy = make_toy(form=form, **options)
    changed = toy.problem.target + torch.randn(9, 3, generator=torch.Generator().manual_seed(3)).double()
    swapped = relabel(removed(toy), toy.problem, changed)
    assert torch.equal(swapped.prediction, removed(toy).prediction)
    for i in range(9):
        target = toy.problem.target.clone()
        target[i] = changed[i]
        again = DualFactor(toy.problem.with_(target=target), toy.kernel, SCALES)
        result = leave_one_out(again, toy.cross)
        for name in ("residual", "weight_change", "intercept_change", "cook", "function_change"):
            assert near(getattr(swapped, name)[i], getattr(result, name)[i]), name


def test_scores_of_a_single_output_scale_with_the_square_of_the_residual():
    toy = make_toy(outputs=1)
    result = removed(toy)
    swapped = relabel(result, toy.problem, result.prediction + 3 * result.residual)
    assert near(swapped.weight_change, 9 * result.weight_change)
    assert near(swapped.function_change, 9 * result.function_change)


def test_a_duplicate_takes_the_share_from_the_unique_sample_that_the_kernel_says():
    toy, ridge = make_toy(outputs=1, ridge=0.3), 0.3
    twice = torch.tensor([0, 1, 2, 3, 4, 5, 6, 7, 8, 0])
    problem = QuadraticProblem(toy.problem.initial[twice], toy.problem.target[twice], ridge)
    kernel = Kernel({name: group[:, twice][:, :, twice] for name, group in toy.kernel.groups.items()}, 1)
    pair = leave_one_out(DualFactor(problem, kernel, SCALES)).weight_change.sqrt()
    matrix = toy.kernel.total(SCALES)[0]
    rest = matrix[1:, 1:] + ridge * torch.eye(8, dtype=torch.float64)
    unexplained = matrix[0, 0] - matrix[0, 1:] @ torch.linalg.solve(rest, matrix[1:, 0])
    unique = removed(toy).weight_change[0].sqrt()
    assert near(pair[0], pair[9])
    assert near(pair[0], unique * ridge / (2 * unexplained + ridge))


def test_order_of_samples_does_not_matter():
    toy = make_toy(intercept=True, weights=WEIGHTS)
    order = torch.randperm(9, generator=torch.Generator().manual_seed(0))
    rows = (3 * order[:, None] + torch.arange(3)).flatten()
    problem = QuadraticProblem(
        toy.problem.initial[order], toy.problem.target[order], 1.0, toy.problem.weight[order], intercept=True
    )
    kernel = Kernel({name: group[:, rows][:, :, rows] for name, group in toy.kernel.groups.items()}, 3)
    result = leave_one_out(DualFactor(problem, kernel, SCALES))
    assert near(result.residual, removed(toy).residual[order])
    assert near(result.weight_change, removed(toy).weight_change[order])


def test_a_rotation_of_the_outputs_rotates_residuals_and_leaves_changes():
    toy = make_toy(intercept=True)
    turn = torch.linalg.qr(torch.randn(3, 3, generator=torch.Generator().manual_seed(0)).double()).Q
    whole = torch.block_diag(*[turn] * 9)
    problem = QuadraticProblem(toy.problem.initial @ turn.T, toy.problem.target @ turn.T, 1.0, intercept=True)
    kernel = Kernel({name: whole @ group @ whole.T for name, group in toy.kernel.groups.items()}, 3)
    result, plain = leave_one_out(DualFactor(problem, kernel, SCALES)), removed(toy)
    assert near(result.residual, plain.residual @ turn.T)
    assert near(result.weight_change, plain.weight_change)
    assert near(result.cook, plain.cook)


@pytest.mark.parametrize("intercept", [False, True])
def test_a_sample_without_gradient_moves_no_weight(intercept):
    toy = make_toy(outputs=1)
    keep = (torch.arange(9) != 4).double()
    kernel = Kernel({name: group * keep * keep[:, None] for name, group in toy.kernel.groups.items()}, 1)
    cross = Kernel({name: group * keep for name, group in toy.cross.groups.items()}, 1)
    result = leave_one_out(DualFactor(toy.problem.with_(intercept=intercept), kernel, SCALES), cross)
    if not intercept:
        assert result.weight_change[4] == pytest.approx(0, abs=1e-14)
        assert result.function_change[4] == pytest.approx(0, abs=1e-14)
        assert near(result.residual[4], toy.problem.residual[4])
    else:
        assert abs(float(result.intercept_change[4])) > 1e-3


def test_a_sample_that_the_others_predict_changes_nothing():
    toy = make_toy(intercept=True)
    target = toy.problem.target.clone()
    target[2] = removed(toy).prediction[2]
    result = leave_one_out(DualFactor(toy.problem.with_(target=target), toy.kernel, SCALES), toy.cross)
    for name in ("residual", "weight_change", "intercept_change", "cook", "function_change"):
        assert float(getattr(result, name)[2].abs().max()) < 1e-12, name


def test_absent_samples_are_predicted_and_change_nothing():
    toy = make_toy(intercept=True, weights=WEIGHTS)
    result, full = removed(toy), refit(toy)
    assert near(result.prediction[1], full.outputs[1])
    assert result.weight_change[1] == 0
    assert result.function_change[1] == 0


def test_chunks_do_not_show(monkeypatch):
    toy = make_toy(intercept=True)
    whole = removed(toy)
    monkeypatch.setattr("lqf_lightning.linear.dual._CHUNK", 2 * 27 * 3)
    assert near(removed(toy).weight_change, whole.weight_change, 1e-13)
    assert near(removed(toy).function_change, whole.function_change, 1e-13)


def test_a_linear_term_without_a_data_term_is_refused():
    toy = make_toy(linear=True, weights=WEIGHTS)
    with pytest.raises(ValueError, match="1 samples of weight 0 have linear terms"):
        removed(toy)


def test_an_intercept_needs_a_sample_that_stays():
    toy = make_toy(intercept=True, weights=[1] + 8 * [0])
    with pytest.raises(ValueError, match="needs 2 of them"):
        removed(toy)


def test_targets_of_another_shape_are_refused():
    toy = make_toy()
    with pytest.raises(ValueError, match=r"expected targets \(9, 3\), got \(9, 1\)"):
        relabel(removed(toy), toy.problem, torch.zeros(9, 1))
