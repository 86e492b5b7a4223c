from typing import Any

import pytest
import torch
from torch import Tensor

from lqf_lightning.linear import DistributedReducer
from lqf_lightning.linear.features import Features
from lqf_lightning.linear.online import OnlinePrimal
from lqf_lightning.linear.primal import PrimalFactor
from lqf_lightning.linear.problem import QuadraticProblem
from ranks import run_on_ranks

EXACT = 1e-11  # relative, float64: the sums are the same but for their order


def draw(seed: int, *size: int) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def make(shared: bool, intercept: bool = True, count: int = 10) -> tuple[QuadraticProblem, Tensor]:
    rows = draw(1, count, 1 if shared else 3, 6)
    weight = draw(2, count).abs()
    return QuadraticProblem(draw(3, count, 3), draw(4, count, 3), 0.2, weight, draw(5, count, 3), intercept), rows


def pick(problem: QuadraticProblem, chosen: Tensor) -> QuadraticProblem:
    names = ("initial", "target", "weight", "linear")
    entries = {n: None if getattr(problem, n) is None else getattr(problem, n)[chosen] for n in names}
    return problem.with_(**entries)


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * want.norm())


def agree(online: OnlinePrimal, problem: QuadraticProblem, rows: Tensor, tolerance: float = EXACT) -> None:
    got, want = online.solution(), PrimalFactor(problem, Features(rows)).solution()
    assert got.direction is not None
    assert want.direction is not None
    assert close(got.direction["features"], want.direction["features"], tolerance)
    assert close(got.intercept, want.intercept, tolerance) or not problem.intercept
    assert abs(got.certificate.objective - want.certificate.objective) <= tolerance * abs(want.certificate.objective)
    assert got.certificate.relative_gradient <= 1e-12


@pytest.mark.parametrize("shared", [False, True], ids=["full", "shared"])
@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("chunks", [[10], [1] * 10, [3, 7], [6, 1, 3]], ids=str)
def test_result_does_not_depend_on_order_nor_chunks(shared: bool, intercept: bool, chunks: list[int]) -> None:
    problem, rows = make(shared, intercept)
    online = OnlinePrimal()
    for part in torch.randperm(10, generator=torch.Generator().manual_seed(6)).split(chunks):
        online.add(pick(problem, part), Features(rows[part]))
    agree(online, problem, rows)


@pytest.mark.parametrize("shared", [False, True], ids=["full", "shared"])
def test_samples_taken_away_were_never_there(shared: bool) -> None:
    problem, rows = make(shared)
    online = OnlinePrimal()
    online.add(problem, Features(rows))
    gone, rest = torch.tensor([2, 7, 8]), torch.tensor([0, 1, 3, 4, 5, 6, 9])
    online.remove(pick(problem, gone), Features(rows[gone]))
    agree(online, pick(problem, rest), rows[rest], 1e-10)


@pytest.mark.parametrize("intercept", [False, True])
@pytest.mark.parametrize("started", [False, True])
def test_new_classes_are_further_columns(intercept: bool, started: bool) -> None:
    problem, rows = make(True, intercept)
    begin = draw(7, 6 + intercept, 2) if started else None
    online = OnlinePrimal()
    online.add(problem, Features(rows))
    online.remove(pick(problem, torch.arange(6, 10)), Features(rows[6:]))
    online.add_outputs(torch.tensor([0.0, 0.5]), begin)
    design = torch.cat([rows[:, 0], torch.ones(10, intercept).double()], 1)
    initial = torch.zeros(10, 2).double() if begin is None else design @ begin
    target = torch.cat([torch.tensor([0.0, 0.5]).double().expand(6, 2), draw(8, 4, 2)])
    wide = problem.with_(
        initial=torch.cat([problem.initial, initial], 1),
        target=torch.cat([problem.target, target], 1),
        linear=torch.cat([problem.linear_terms, torch.zeros(10, 2)], 1),
    )
    online.add(pick(wide, torch.arange(6, 10)), Features(rows[6:]))
    agree(online, wide, rows)


def test_ranks_add_their_own_samples_and_padding_counts_once() -> None:
    problem, rows = make(False)
    expected = PrimalFactor(problem, Features(rows)).solution()

    def work() -> Any:
        reducer = DistributedReducer()
        online = OnlinePrimal(reducer)
        for chunk in (torch.arange(5), torch.arange(5, 10)):
            own = torch.cat([chunk[reducer.rank :: 3], chunk[:1]])
            online.add(pick(problem, own), Features(rows[own], own))
        return [online.solution() for _ in range(2)][-1].direction

    for direction in run_on_ranks(3, work):
        assert expected.direction is not None
        assert close(direction["features"], expected.direction["features"], 1e-10)


def test_what_the_recursion_cannot_do_is_said() -> None:
    problem, rows = make(False)
    online = OnlinePrimal()
    with pytest.raises(ValueError, match="call add first"):
        online.solution()
    online.add(problem, Features(rows))
    with pytest.raises(ValueError, match=r"coupled outputs of the whole network.* solve again"):
        online.add_outputs(torch.zeros(1))
    with pytest.raises(ValueError, match=r"before have ridge 0.2 and intercept=True, these have 0.3"):
        online.add(problem.with_(ridge=0.3), Features(rows))
    with pytest.raises(ValueError, match=r"expected features \(n, 3, 6\) like those before, got \(10, 3, 5\)"):
        online.add(problem, Features(rows[:, :, :5]))
