from typing import Any

import pytest
import torch
from torch import Tensor

from linear.dense_ridge import flat, near
from linear.nets import build_net
from linear.test_solve_cg import problems
from lqf_lightning.linear import LinearizedModel, current_reducer, fit_kfac
from lqf_lightning.linear.jacobian import StreamedJacobian
from lqf_lightning.linear.metric import Metric
from lqf_lightning.linear.solve_cg import solve_cg
from ranks import run_on_ranks

AGREE = 1e-10  # relative: a few steps, before the rounding of sums in another order has grown


def _solve(x: Tensor, shards: list[list[int]], preconditioned: bool) -> list[dict[str, Any]]:
    reducer, net = current_reducer(), build_net("residual")
    own = torch.tensor(shards[reducer.rank], dtype=torch.int64)
    model, batches = LinearizedModel(net, example=x), list(x[own].split(2)) if len(own) else []
    precondition = None
    if preconditioned:
        kfac = fit_kfac(net, None, [x], damping=1.0, intercept="6.bias")
        precondition = lambda ridge: Metric().curvature_solver(kfac, len(x), ridge)  # noqa: E731
    solutions = solve_cg(
        problems(net(x).detach()), StreamedJacobian(model, batches), exclude=["6.bias"], max_steps=5, tolerance=1e-9,
        positions=own, reducer=reducer, precondition=precondition,
    )  # fmt: skip
    return [
        {
            "direction": flat(solution.direction or {}),
            "outputs": solution.outputs,
            "coefficients": solution.coefficients,
            "intercept": solution.intercept,
            "gradient": solution.certificate.relative_gradient,
        }
        for solution in solutions
    ]


@pytest.mark.parametrize("preconditioned", [False, True])
@pytest.mark.parametrize(
    "shards",
    [
        [[3, 0, 4, 2, 1]],
        [[0, 1, 2, 3], [4]],
        [[4, 2], [0, 1, 3], []],
        [[0, 3, 4], [1, 4, 0], [2, 0]],  # padded: samples 0 and 4 are on several ranks
        [[0, 1, 1, 2], [3, 4, 3, 0]],  # and some twice on one
    ],
)
def test_ranks_agree_with_a_single_process(shards: list[list[int]], preconditioned: bool, x: Tensor) -> None:
    expected = _solve(x, [[0, 1, 2, 3, 4]], preconditioned)
    results = run_on_ranks(len(shards), _solve, x, shards, preconditioned)
    for solutions in results:
        for got, want, first in zip(solutions, expected, results[0], strict=True):
            for name in ("direction", "outputs", "coefficients"):
                assert near(got[name], want[name], AGREE)
                assert torch.equal(got[name], first[name])
            assert torch.allclose(got["intercept"], want["intercept"], rtol=AGREE, atol=AGREE)
            assert got["gradient"] == pytest.approx(want["gradient"], rel=1e-8)
