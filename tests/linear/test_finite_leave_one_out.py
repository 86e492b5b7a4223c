import math
from dataclasses import replace

import pytest
import torch
from torch import Tensor

from linear.problems import SCALES, Toy, make_toy, near
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.finite_leave_one_out import leave_one_out_descent, leave_one_out_flow
from lqf_lightning.linear.finite_time import descend, flow
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.kernel_spectrum import KernelSpectrum
from lqf_lightning.linear.leave_one_out import leave_one_out

FORMS = ["full", "diagonal", "trace", "last_layer"]
FULL = [1, 0.1, 2, 0.5, 1, 1, 3, 1, 0.2]
OPTIONS = {
    "plain": {},
    "intercept": {"intercept": True},
    "weights": {"weights": [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "intercept, weights": {"intercept": True, "weights": [1, 0, 2, 0.5, 1, 1, 3, 1, 0.2]},
    "all": {"intercept": True, "linear": True, "weights": FULL},
}
NAMES = ("residual", "prediction", "weight_change", "intercept_change", "function_change")


def spectrum(toy: Toy) -> KernelSpectrum:
    return KernelSpectrum(toy.problem, toy.kernel, SCALES)


def with_only(toy: Toy, kept: Tensor) -> Toy:
    """The toy with the kept samples alone, and all samples of the whole toy among the others."""
    problem, coupled = toy.problem, toy.kernel.coupled
    rows = (coupled * kept[:, None] + torch.arange(coupled)).flatten()
    part = replace(
        problem,
        initial=problem.initial[kept],
        target=problem.target[kept],
        weight=None if problem.weight is None else problem.weight[kept],
        linear=None if problem.linear is None else problem.linear[kept],
    )
    own = {name: group[:, rows][:, :, rows] for name, group in toy.kernel.groups.items()}
    cross = {n: torch.cat([toy.kernel.groups[n], toy.cross.groups[n]], 1)[:, :, rows] for n in own}
    form, outputs = toy.kernel.form, toy.kernel.outputs
    initial = torch.cat([problem.initial.double(), toy.initial_other])
    return replace(
        toy, problem=part, kernel=Kernel(own, outputs, form), cross=Kernel(cross, outputs, form), initial_other=initial
    )


def by_separate_runs(toy: Toy, run) -> dict[str, Tensor]:
    """Train on all samples and on all but one, each by itself; `run` maps a spectrum to a solution."""

    def train(kept: list[int]) -> tuple[Tensor, Tensor, Tensor]:
        part = with_only(toy, torch.tensor(kept))
        found = spectrum(part)
        solution = run(found)
        beta = torch.zeros(9, 3, dtype=torch.float64)
        beta[kept] = solution.coefficients
        return beta, solution.intercept, found.system.predict(solution, part.cross, part.initial_other)

    whole = train(list(range(9)))
    system, result = spectrum(toy).system, {name: [] for name in NAMES}
    for i in range(9):
        part = train([j for j in range(9) if j != i])
        beta, intercept, outputs = (a - b for a, b in zip(whole, part, strict=True))
        result["prediction"].append(part[2][i])
        result["residual"].append(toy.problem.target[i] - part[2][i])
        result["weight_change"].append(torch.tensor(system.length(beta) ** 2, dtype=torch.float64))
        result["intercept_change"].append(intercept)
        result["function_change"].append(outputs[9:].square().sum(1).mean())
    return {name: torch.stack(values) for name, values in result.items()}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("ridge", [1e-3, 1.0])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_masked_descent_is_one_descent_for_each_sample_left_out(form, ridge, options):
    toy = make_toy(form=form, ridge=ridge, **options)
    result = leave_one_out_descent(spectrum(toy), 1e-3, 40, cross=toy.cross)
    for name, value in by_separate_runs(toy, lambda found: descend(found, 1e-3, 40)).items():
        assert near(getattr(result, name), value), name


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_the_contour_is_one_flow_for_each_sample_left_out(form, options):
    toy = make_toy(form=form, ridge=1e-3, **options)
    for time in (1e-3, 0.1, 30.0):
        result = leave_one_out_flow(spectrum(toy), time, cross=toy.cross)
        for name, value in by_separate_runs(toy, lambda found, time=time: flow(found, time)).items():
            assert near(getattr(result, name), value, 1e-8), name


def test_twenty_four_nodes_are_exact_to_a_trillionth_and_fewer_less_so():
    toy = make_toy(intercept=True)
    exact = by_separate_runs(toy, lambda found: flow(found, 0.05))["prediction"]
    errors = [
        float((leave_one_out_flow(spectrum(toy), 0.05, nodes=nodes).prediction - exact).abs().max())
        for nodes in (8, 16, 24)
    ]
    assert errors[0] > 1e-5 > errors[1] > 1e-9 > errors[2]
    assert errors[2] < 1e-10


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_after_long_training_both_are_leave_one_out_at_the_optimum(form, options):
    toy = make_toy(form=form, **options)
    decomposed, limit = spectrum(toy), leave_one_out(DualFactor(toy.problem, toy.kernel, SCALES), toy.cross)
    step = 1.9 / (float(decomposed.values.max()) + 1)
    late = leave_one_out_descent(decomposed, step, math.ceil(30 / step), cross=toy.cross)
    for result in (late, leave_one_out_flow(decomposed, 40.0, cross=toy.cross)):
        for name in NAMES:
            assert near(getattr(result, name), getattr(limit, name)), name


def test_before_training_nothing_depends_on_a_sample():
    toy = make_toy()
    for result in (leave_one_out_descent(spectrum(toy), 1e-3, 0), leave_one_out_flow(spectrum(toy), 0.0)):
        assert near(result.prediction, toy.problem.initial)
        assert float(result.weight_change.max()) == 0
        assert result.function_change is None


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
def test_chunks_do_not_show_and_are_watched(form, monkeypatch):
    toy, seen = make_toy(form=form, intercept=True), []
    runs = (
        lambda **extra: leave_one_out_descent(spectrum(toy), 1e-3, 5, cross=toy.cross, **extra),
        lambda **extra: leave_one_out_flow(spectrum(toy), 0.1, cross=toy.cross, **extra),
    )
    whole = [run() for run in runs]
    monkeypatch.setattr("lqf_lightning.linear.finite_leave_one_out._CHUNK", 2 * 9 * 9)
    for run, expected in zip(runs, whole, strict=True):
        seen.clear()
        result = run(watch=lambda starts: (seen.append(start) or start for start in starts))
        assert len(seen) > 1
        for name in NAMES:
            assert near(getattr(result, name), getattr(expected, name), 1e-12), name


def test_what_cannot_be_followed_is_refused():
    toy = make_toy()
    with pytest.raises(ValueError, match="even number of nodes, got 5"):
        leave_one_out_flow(spectrum(toy), 1.0, nodes=5)
    with pytest.raises(ValueError, match="finite and not negative"):
        leave_one_out_flow(spectrum(toy), -1.0)
    with pytest.raises(ValueError, match="a step between 0 and"):
        leave_one_out_descent(spectrum(toy), 1.0, 3)
    with pytest.raises(ValueError, match="needs 2 of them"):
        leave_one_out_flow(spectrum(make_toy(intercept=True, weights=[1] + 8 * [0])), 1.0)
