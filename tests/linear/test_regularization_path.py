from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linear.problems import SCALES, Toy, make_toy, near, refit
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.leave_one_out import leave_one_out
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.regularization_path import RegularizationPath, default_ridges, regularization_path

FORMS = ["full", "diagonal", "trace", "last_layer"]
RIDGES = [1e-3, 0.1, 1.0, 30.0]
WEIGHTS = [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]
OPTIONS = {
    "plain": {},
    "single": {"outputs": 1, "intercept": True},
    "weights": {"intercept": True, "weights": WEIGHTS},
    "weights, no intercept": {"weights": WEIGHTS},
    "all": {"intercept": True, "linear": True, "weights": [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "few weights": {"intercept": True, "body": 1},
}


def spectrum(toy: Toy) -> KernelSpectrum:
    return KernelSpectrum(toy.problem, toy.kernel, SCALES)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_every_ridge_is_what_a_solution_of_its_own_gives(form, options):
    toy = make_toy(form=form, **options)
    path = regularization_path(spectrum(toy), RIDGES)
    weight = toy.problem.root_weight.square()
    for r, ridge in enumerate(RIDGES):
        factor = DualFactor(toy.problem.with_(ridge=ridge), toy.kernel, SCALES)
        solution, result = factor.solution(), leave_one_out(factor)
        assert near(path.residual[r], result.residual)
        assert near(path.press[r], (weight * result.residual.square()).sum())
        assert near(path.degrees_of_freedom[r], torch.tensor(factor.degrees_of_freedom, dtype=torch.float64))
        assert near(path.weight_norm[r], refit(replace(toy, problem=factor.problem)).direction.norm())
        error = (weight * (toy.problem.target - solution.outputs).square()).sum()
        assert near(path.training_error[r], error)
        number = toy.problem.outputs * int((weight > 0).sum())
        # the difference from 1 loses what the small ridge leaves of it, about 1e-4
        assert near(path.gcv[r], error / number / (1 - factor.degrees_of_freedom / number) ** 2, 1e-6)
        if toy.problem.outputs > 1:
            right = (result.prediction.argmax(1) == toy.problem.target.argmax(1)).double()
            assert near(path.accuracy[r], (weight[:, 0] * right).sum() / weight.sum())


@pytest.mark.parametrize("form", FORMS)
def test_eigenvectors_of_the_complement_are_orthonormal_and_orthogonal_to_the_intercept(form):
    found = spectrum(make_toy(form=form, intercept=True, weights=WEIGHTS, body=1))
    eye = torch.eye(found.values.shape[1], dtype=torch.float64).expand(len(found.values), -1, -1)
    assert near(found.vectors.mT @ found.vectors, eye)
    assert float((found.system.columns.T @ found.vectors).abs().max()) < 1e-12


def test_accuracy_on_other_samples_is_that_of_refits():
    toy = make_toy(intercept=True)
    target = torch.randn(4, 3, generator=torch.Generator().manual_seed(2))
    path = regularization_path(spectrum(toy), RIDGES, cross=toy.cross, initial=toy.initial_other, target=target)
    for r, ridge in enumerate(RIDGES):
        outputs = refit(replace(toy, problem=toy.problem.with_(ridge=ridge))).outputs_other
        assert path.validation_accuracy[r] == (outputs.argmax(1) == target.argmax(1)).double().mean()


def made_up(accuracy: list[float] | None, press: list[float], entropy: list[float] | None) -> RegularizationPath:
    def tensor(values: list[float] | None) -> Tensor | None:
        return None if values is None else torch.tensor(values, dtype=torch.float64)

    none = torch.zeros(len(press))
    ridges = torch.tensor([1.0, 2.0, 3.0, 4.0])
    return RegularizationPath(ridges, none, tensor(press), tensor(accuracy), tensor(entropy), none, none, none, none)


def test_ties_of_the_accuracy_are_broken_by_the_squared_residual():
    path = made_up([0.8, 0.9, 0.9, 0.7], [5.0, 4.0, 3.0, 2.0], [0.4, 0.5, 0.6, 0.7])
    assert (path.choose(), path.choose("press"), path.choose("cross_entropy")) == (3.0, 4.0, 1.0)


def test_a_single_output_is_chosen_by_the_squared_residual_alone():
    path = made_up(None, [5.0, 1.0, 3.0, 2.0], None)
    assert path.choose("press") == 2.0
    with pytest.raises(ValueError, match="choose by 'press'"):
        path.choose("accuracy")
    with pytest.raises(ValueError, match="expected one of"):
        path.choose("gcv")


def test_the_default_grid_spans_five_decades_about_the_kernel():
    toy = make_toy()
    grid = default_ridges(spectrum(toy))
    scale = toy.kernel.total(SCALES)[0].diagonal().mean()
    assert near(grid[[0, -1]], scale * torch.tensor([1e-4, 10], dtype=torch.float64))
    assert near(grid.log().diff(), grid.log().diff().mean().expand(15))
    assert near(regularization_path(spectrum(toy)).ridges, grid)


def test_a_path_over_noise_prefers_a_strong_ridge_and_over_signal_a_weak_one():
    draw = torch.Generator().manual_seed(0)
    features = torch.randn(60, 20, generator=draw, dtype=torch.float64)
    signal, noise = features @ torch.randn(20, 3, generator=draw).double(), torch.randn(60, 3, generator=draw).double()
    kernel = Kernel({"all": (features @ features.T)[None]}, 3, "last_layer")
    chosen = {}
    for name, target in (("signal", signal), ("noise", noise)):
        problem = QuadraticProblem(torch.zeros(60, 3), target, 1.0)
        chosen[name] = regularization_path(KernelSpectrum(problem, kernel), [1e-3, 1e4]).choose("press")
    assert chosen == {"signal": 1e-3, "noise": 1e4}


@pytest.mark.parametrize("ridges", [[], [0.0], [-1.0], [float("nan")], [float("inf")], [1e-14]])
def test_ridges_that_double_precision_cannot_solve_are_refused(ridges):
    with pytest.raises(ValueError, match="at least"):
        regularization_path(spectrum(make_toy()), ridges)


def test_parts_that_are_missing_or_wrong_are_named():
    toy = make_toy()
    with pytest.raises(ValueError, match="`cross`, `initial` and `target` together"):
        regularization_path(spectrum(toy), RIDGES, cross=toy.cross)
    with pytest.raises(ValueError, match="weight 0 has a linear term"):
        spectrum(make_toy(linear=True, weights=WEIGHTS))
    zero = KernelSpectrum(toy.problem, Kernel({name: 0 * group for name, group in toy.kernel.groups.items()}, 3))
    with pytest.raises(ValueError, match="the kernel is zero"):
        default_ridges(zero)
    negative = Kernel({"all": torch.diag(torch.tensor([1.0, -1e-4])).double()[None]}, 1)
    with pytest.raises(ValueError, match=r"has the eigenvalue -0\.0001"):
        KernelSpectrum(QuadraticProblem(torch.zeros(2, 1), torch.ones(2, 1), 1.0), negative)
    with pytest.raises(ValueError, match="GiB"):
        KernelSpectrum(toy.problem, toy.kernel, SCALES, budget=1)


def test_progress_sees_every_ridge():
    seen = []
    regularization_path(spectrum(make_toy()), RIDGES, watch=lambda grid: (seen.append(r) or r for r in grid))
    assert seen == RIDGES
