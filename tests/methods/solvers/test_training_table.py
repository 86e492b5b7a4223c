import pytest
import torch

from lqf_lightning.methods.solvers.training_table import TrainingTable
from methods.dense_lqf import ALPHA, build, outputs_at_start
from methods.solvers.runs import solve
from methods.tensors import draw


@pytest.fixture
def solved():
    method = build(solver="cg", ridge=0.02)
    solve(method, epochs=1)
    return method


def test_rows_are_those_of_the_network_before_training(solved):
    images, label = draw(11)
    table = solved.solver.table
    assert table.index.tolist() == list(range(11))
    assert torch.equal(table.label, label)
    assert torch.allclose(table.initial, outputs_at_start(images), rtol=1e-12)
    assert torch.allclose(TrainingTable.collect(solved).initial, table.initial)  # dw plays no part


def test_the_problem_has_scaled_one_hot_targets_and_the_ridge_of_the_sum(solved):
    problem = solved.solver.table.problem(solved)
    assert problem.ridge == pytest.approx(11 * 0.02, rel=1e-15)
    assert problem.intercept
    assert problem.target.argmax(1).tolist() == draw(11)[1].tolist()
    assert problem.target.unique().tolist() == [0, ALPHA]
    assert solved.solver.table.problem(solved, ridge=3.0).ridge == 3.0


def test_batches_out_of_order_are_told(solved):
    table = solved.solver.table
    table.check_order(torch.tensor([4, 5]), slice(4, 6))
    for wrong in ([5, 4], [4]):
        with pytest.raises(ValueError, match=r"expected \[4, 5\]: with `sweeps`"):
            table.check_order(torch.tensor(wrong), slice(4, 6))
