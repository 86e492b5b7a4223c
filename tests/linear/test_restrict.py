import pytest
import torch

from linear.problems import SCALES, make_toy, near, refit
from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.restrict import restrict_kernel, restrict_problem


@pytest.mark.parametrize("form", ["full", "diagonal", "trace", "last_layer"])
def test_a_part_of_the_kernel_solves_the_problem_of_its_samples(form):
    toy = make_toy(form=form, intercept=True, linear=True, weights=[1.0, 2.0, 1.0, 0.0, 1.0, 3.0, 1.0, 1.0, 0.5])
    keep = [7, 0, 5, 3]
    positions = torch.tensor(keep)
    part = restrict_kernel(toy.kernel, rows=positions, columns=positions)
    factor = DualFactor(restrict_problem(toy.problem, positions), part, SCALES)
    expected = refit(toy, keep)
    assert near(factor.solution().outputs, expected.outputs[keep])
    cross = restrict_kernel(toy.cross, columns=positions)
    assert near(factor.predict(cross, toy.initial_other), expected.outputs_other)
