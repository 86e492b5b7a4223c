import pytest
import torch
from torch import Tensor

from linear.problems import SCALES, make_toy, near
from lqf_lightning.linear.dual_precondition import DualPrecondition
from lqf_lightning.linear.kernel import Kernel, KernelForm
from lqf_lightning.linear.problem import QuadraticProblem

WEIGHTS = [1.0, 0.0, 2.0, 0.5, 3.0, 0.0, 1.5, 1.0, 4.0]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def bordered_inverse(problem: QuadraticProblem, kernel: Tensor) -> Tensor:
    """Top left block of the inverse of the dual system, rows by sample and then by output."""
    root = problem.root_weight.repeat_interleave(problem.outputs, 0)
    system = root * kernel * root.T + problem.ridge * torch.eye(len(root), dtype=torch.float64)
    if not problem.intercept:
        return torch.linalg.inv(system)
    border = root * torch.eye(problem.outputs, dtype=torch.float64).repeat(problem.samples, 1)
    corner = torch.zeros(problem.outputs, problem.outputs, dtype=torch.float64)
    whole = torch.cat([torch.cat([system, border], 1), torch.cat([border.T, corner], 1)])
    return torch.linalg.inv(whole)[: len(root), : len(root)]


def whole_matrix(kernel: Kernel, samples: int) -> Tensor:
    """The kernel of any form among all outputs, by its action on unit right-hand sides."""
    total, size = kernel.total(SCALES), samples * kernel.outputs
    units = torch.eye(size, dtype=torch.float64).view(size, samples, kernel.outputs)
    return torch.stack([kernel.join(total @ kernel.split(unit)).flatten() for unit in units], 1)


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_it_is_the_inverse_of_the_dual_system(form: KernelForm, intercept: bool, weights: list[float] | None) -> None:
    toy = make_toy(form=form, intercept=intercept, weights=weights, ridge=0.3)
    inverse = bordered_inverse(toy.problem, whole_matrix(toy.kernel, 9))
    apply, residual = DualPrecondition(toy.problem, toy.kernel, SCALES), draw(9, 3)
    step = apply(residual)
    assert near(step, (inverse @ residual.flatten()).view(9, 3), 1e-10)
    if intercept:
        assert (toy.problem.root_weight * step).sum(0).abs().max() < 1e-10 * step.norm()
    if weights is not None:
        assert near(step[1], residual[1] / 0.3, 1e-12)


@pytest.mark.parametrize("columns", [2, 40])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_rows_stand_for_the_kernel_of_their_products(
    columns: int, intercept: bool, weights: list[float] | None
) -> None:
    problem, rows = make_toy(intercept=intercept, weights=weights).problem, draw(9, 3, columns, seed=1)
    flat, residual = rows.flatten(0, 1), draw(9, 3)
    want = bordered_inverse(problem, flat @ flat.T) @ residual.flatten()
    assert near(DualPrecondition.of_rows(problem, rows)(residual), want.view(9, 3), 1e-10)
    # Rows in single precision, applied in double.
    single = DualPrecondition.of_rows(problem, rows.float())(residual)
    assert single.dtype == torch.float64
    assert near(single, want.view(9, 3), 1e-5)


def test_a_kernel_of_other_samples_is_refused() -> None:
    with pytest.raises(ValueError, match=r"full kernel of 9 training samples with 3 outputs"):
        DualPrecondition.of_rows(make_toy().problem, draw(8, 3, 40))
