import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linear.problems import SCALES, Toy, make_toy, near, refit
from lqf_lightning.linear.dual import DualFactor, solve_dual
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem

FORMS = ["full", "diagonal", "trace", "last_layer"]
PLAIN = {"outputs": 3, "ridge": 1.0}
RICH = {"outputs": 3, "intercept": True, "linear": True, "weights": [1, 0, 2, 0.5, 1, 1, 3, 0, 1]}


def factor(toy: Toy) -> DualFactor:
    return DualFactor(toy.problem, toy.kernel, SCALES)


def gradient_length(toy: Toy, coefficients: Tensor) -> float:
    """Norm of the gradient in weight space at the movement of these coefficients, the intercept at its optimum."""
    problem, weight = toy.problem, toy.problem.root_weight.square()
    squares = 0.0
    count = toy.features.shape[0]
    for b, columns in enumerate(torch.arange(problem.outputs).reshape(-1, toy.features.shape[2])):
        features, beta = toy.features[b % count], coefficients[:, columns]
        direction = torch.einsum("icp,ic->p", features, beta)
        error = (problem.residual[:, columns] - features @ direction).detach()
        linear = problem.linear_terms[:, columns]
        if problem.intercept:
            error = error - (weight * error - linear).sum(0) / weight.sum()
        pull = weight * error - linear
        squares += (problem.ridge * direction - torch.einsum("icp,ic->p", features, pull)).square().sum().item()
    return math.sqrt(squares)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("options", [PLAIN, RICH, {"outputs": 1, "intercept": True}], ids=["plain", "rich", "single"])
def test_the_optimum_is_that_of_the_normal_equations_in_weight_space(form, ridge, options):
    toy = make_toy(**{**options, "form": form, "ridge": ridge})
    expected, solved = refit(toy), factor(toy)
    solution = solved.solution()
    assert near(solution.outputs, expected.outputs)
    assert near(solution.intercept, expected.intercept)
    assert near(solved.predict(toy.cross, toy.initial_other), expected.outputs_other)


@pytest.mark.parametrize("body", [3, 60])
def test_fewer_and_more_weights_than_equations(body):
    toy = make_toy(body=body, intercept=True, ridge=1e-2)
    assert near(solve_dual(toy.problem, toy.kernel, SCALES).outputs, refit(toy).outputs)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", [PLAIN, RICH], ids=["plain", "rich"])
def test_the_certificate_measures_the_gradient_and_bounds_the_distance(form, options):
    toy = make_toy(**options, form=form)
    solved, expected = factor(toy), refit(toy)
    optimum = solved.solution()
    assert optimum.certificate.relative_gradient < 1e-12
    off = optimum.coefficients + 0.1 * torch.randn(
        9, 3, generator=torch.Generator().manual_seed(4), dtype=torch.float64
    )
    guess = solved.system.certify(off)
    length, start = gradient_length(toy, off), gradient_length(toy, torch.zeros_like(off))
    assert guess.certificate.relative_gradient == pytest.approx(length / start, rel=1e-9)
    assert guess.certificate.distance_bound == pytest.approx(length / toy.problem.ridge, rel=1e-9)
    distance = solved.system.length(off - optimum.coefficients)
    assert 0 < distance <= guess.certificate.distance_bound
    assert optimum.certificate.objective < guess.certificate.objective
    assert optimum.certificate.objective == pytest.approx(
        objective(toy, expected.direction, expected.outputs), rel=1e-9
    )


def objective(toy: Toy, direction: Tensor, outputs: Tensor) -> float:
    problem = toy.problem
    data = 0.5 * problem.root_weight.square() * (outputs - problem.target).square()
    linear = problem.linear_terms * (outputs - problem.initial)
    return float(data.sum() + linear.sum() + 0.5 * problem.ridge * direction.square().sum())


def test_a_group_that_is_left_out_is_frozen():
    toy = make_toy()
    alone = Kernel({"head": toy.kernel.groups["head"]}, 3)
    got = DualFactor(toy.problem, toy.kernel, {"head": 2.0}).solution().outputs
    assert near(got, DualFactor(toy.problem, alone, {"head": 2.0}).solution().outputs)


@pytest.mark.parametrize("form", FORMS)
def test_degrees_of_freedom_and_determinant_are_those_of_the_spectrum(form):
    toy = make_toy(form=form, ridge=0.3, weights=[1, 0, 2, 0.5, 1, 1, 3, 0, 1])
    solved = factor(toy)
    values = torch.linalg.eigvalsh(solved.system.weighted())
    copies = 3 // (toy.kernel.blocks * toy.kernel.coupled)
    assert solved.degrees_of_freedom == pytest.approx(copies * float((values / (values + 0.3)).sum()), rel=1e-9)
    assert solved.log_determinant == pytest.approx(copies * float((1 + values / 0.3).log().sum()), rel=1e-9)


def test_the_determinant_of_samples_is_that_of_weights():
    toy = make_toy(ridge=0.7)
    rows = toy.features.reshape(27, -1)
    expected = torch.logdet(torch.eye(rows.shape[1]).double() + rows.T @ rows / 0.7)
    assert factor(toy).log_determinant == pytest.approx(float(expected), rel=1e-9)


def test_an_intercept_adds_one_degree_of_freedom_per_output_to_the_centered_kernel():
    toy = make_toy(ridge=0.3, intercept=True, form="trace")
    center = torch.eye(9, dtype=torch.float64) - 1 / 9
    values = torch.linalg.eigvalsh(center @ toy.kernel.total(SCALES)[0] @ center)
    assert factor(toy).degrees_of_freedom == pytest.approx(3 * (1 + float((values / (values + 0.3)).sum())), rel=1e-9)


@pytest.mark.parametrize("form", FORMS)
def test_the_bordered_inverse_is_the_block_of_the_bordered_matrix(form):
    toy = make_toy(form=form, intercept=True, weights=[1, 0, 2, 0.5, 1, 1, 3, 0, 1], ridge=0.1)
    solved = factor(toy)
    c, rows = toy.kernel.coupled, len(solved.system.root)
    system = solved.system.weighted() + 0.1 * torch.eye(rows, dtype=torch.float64)
    columns = solved.system.root * torch.eye(c).repeat(9, 1)
    for block, inverse, border in zip(system, solved.inverse, solved.border, strict=True):
        whole = torch.linalg.inv(
            torch.cat([torch.cat([block, columns], 1), torch.cat([columns.T, torch.zeros(c, c)], 1)])
        )
        assert near(inverse, whole[:rows, :rows])
        assert near(border, whole[rows:, :rows])


def test_targets_scale_the_movement():
    toy = make_toy(intercept=True)
    doubled = replace(toy.problem, target=toy.problem.initial + 2 * toy.problem.residual)
    one, two = (DualFactor(problem, toy.kernel, SCALES).solution() for problem in (toy.problem, doubled))
    assert near(two.coefficients, 2 * one.coefficients)
    assert near(two.outputs - toy.problem.initial, 2 * (one.outputs - toy.problem.initial))


def test_order_of_samples_and_of_outputs_does_not_matter():
    toy = make_toy(intercept=True, weights=[1, 0, 2, 0.5, 1, 1, 3, 0, 1])
    problem, order, swap = toy.problem, torch.randperm(9), torch.tensor([2, 0, 1])
    rows = (3 * order[:, None] + swap).flatten()
    moved = QuadraticProblem(
        problem.initial[order][:, swap], problem.target[order][:, swap], 1.0, problem.weight[order], intercept=True
    )
    kernel = Kernel({name: group[:, rows][:, :, rows] for name, group in toy.kernel.groups.items()}, 3)
    assert near(DualFactor(moved, kernel, SCALES).solution().outputs, factor(toy).solution().outputs[order][:, swap])


def test_a_sample_of_weight_two_is_two_samples():
    toy = make_toy(intercept=True, weights=[1, 1, 2, 1, 1, 1, 1, 1, 1])
    twice = torch.tensor([0, 1, 2, 2, 3, 4, 5, 6, 7, 8])
    rows = (3 * twice[:, None] + torch.arange(3)).flatten()
    problem = QuadraticProblem(toy.problem.initial[twice], toy.problem.target[twice], 1.0, intercept=True)
    kernel = Kernel({name: group[:, rows][:, :, rows] for name, group in toy.kernel.groups.items()}, 3)
    assert near(DualFactor(problem, kernel, SCALES).solution().outputs, factor(toy).solution().outputs[twice])


def test_the_movement_shrinks_and_the_error_grows_with_the_ridge():
    toys = [make_toy(ridge=ridge, intercept=True) for ridge in (1e-3, 1e-1, 1e1, 1e3, 1e9)]
    solved = [(DualFactor(t.problem, t.kernel, SCALES)) for t in toys]
    solutions = [s.solution() for s in solved]
    lengths = [s.system.length(x.coefficients) for s, x in zip(solved, solutions, strict=True)]
    errors = [float((x.outputs - t.problem.target).square().sum()) for t, x in zip(toys, solutions, strict=True)]
    assert lengths == sorted(lengths, reverse=True)
    assert errors == sorted(errors)
    assert lengths[-1] < 1e-6 * lengths[0]


def test_single_precision_parts_are_solved_in_double():
    toy = make_toy()
    single = Kernel({name: group.float() for name, group in toy.kernel.groups.items()}, 3)
    problem = QuadraticProblem(toy.problem.initial.float(), toy.problem.target.float(), 1.0)
    solution = DualFactor(problem, single, SCALES).solution()
    assert solution.outputs.dtype == torch.float64
    assert solution.certificate.relative_gradient < 1e-12
    assert near(solution.outputs, refit(toy).outputs, 1e-5)


def test_a_ridge_beyond_double_precision_names_one_that_would_do():
    toy = make_toy(ridge=1e-12)
    with pytest.raises(ValueError, match=r"condition is .*e\+\d+.*set method\.ridge=") as caught:
        factor(toy)
    message = str(caught.value)
    ridge = float(message.split("Take ")[1].split()[0])
    mean = float(message.split("method.ridge=")[1].split()[0])
    assert mean == pytest.approx(ridge / toy.problem.samples, rel=0.05)  # two digits are printed
    assert near(
        DualFactor(toy.problem.with_(ridge=ridge), toy.kernel, SCALES).solution().outputs, toy.problem.target, 1e-6
    )


@pytest.mark.parametrize("ridge", [1e-9, 1e-2])
def test_negative_eigenvalues_are_refused_whatever_the_ridge(ridge):
    problem = QuadraticProblem(torch.zeros(3, 1), torch.ones(3, 1), ridge)
    matrix = torch.diag(torch.tensor([1.0, 1.0, -1e-4], dtype=torch.float64))
    with pytest.raises(ValueError, match="has an eigenvalue below -1e-0") as caught:
        DualFactor(problem, Kernel({"all": matrix[None]}, 1))
    if ridge < 1e-6:  # 1e-6, divided by three samples
        assert "set method.ridge=3.3e-07" in str(caught.value)


def test_rounding_below_zero_is_accepted():
    problem = QuadraticProblem(torch.zeros(3, 1), torch.ones(3, 1), 1e-2)
    matrix = torch.diag(torch.tensor([1.0, 1.0, -1e-8], dtype=torch.float64))
    assert DualFactor(problem, Kernel({"all": matrix[None]}, 1)).solution().certificate.relative_gradient < 1e-12


def test_what_does_not_fit_into_memory_is_refused_with_numbers_before_it_is_tried():
    toy = make_toy()
    with pytest.raises(ValueError, match=r"9 samples and 3 outputs needs .* GiB.*trace or last_layer"):
        DualFactor(toy.problem, toy.kernel, SCALES, budget=3 * 8 * 27**2 - 1)
    DualFactor(toy.problem, toy.kernel, SCALES, budget=3 * 8 * 27**2)


def test_kernels_of_other_samples_or_outputs_are_refused():
    toy, other = make_toy(), make_toy(form="trace")
    with pytest.raises(ValueError, match=r"has matrices \(1, 27, 27\); got 3 outputs and \[\(1, 12, 27\)\]"):
        DualFactor(toy.problem, toy.cross, SCALES)
    with pytest.raises(ValueError, match="expected a full kernel of 3 outputs with 27 columns"):
        factor(toy).predict(other.cross, toy.initial_other)
    with pytest.raises(ValueError, match=r"expected initial outputs \(4, 3\)"):
        factor(toy).predict(toy.cross, toy.initial_other[:2])


def test_rounding_that_makes_a_kernel_asymmetric_is_averaged_out():
    toy = make_toy(intercept=True)
    noise = {name: 1e-6 * torch.randn_like(group) for name, group in toy.kernel.groups.items()}
    rough, smooth = (
        Kernel({name: group + 0.5 * (noise[name] + turn(noise[name])) for name, group in toy.kernel.groups.items()}, 3)
        for turn in (lambda part: part, lambda part: part.mT)
    )
    assert near(solve_dual(toy.problem, rough, SCALES).outputs, solve_dual(toy.problem, smooth, SCALES).outputs, 1e-13)


def test_a_point_is_certified_for_any_ridge():
    toy = make_toy(intercept=True, ridge=0.5)
    other = DualFactor(toy.problem.with_(ridge=2.0), toy.kernel, SCALES)
    solution = other.solution()
    assert factor(toy).system.certify(solution.coefficients, 2.0).certificate.relative_gradient < 1e-12
    assert factor(toy).system.certify(solution.coefficients).certificate.relative_gradient > 1e-3
