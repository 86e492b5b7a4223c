from functools import partial

import pytest
import torch

from lqf_lightning.linear import fit_kfac
from lqf_lightning.methods import Finetune
from methods.dense_lqf import build, flat
from methods.solvers.runs import dense
from methods.tensors import CLASSES, TensorData, build_backbone, build_trainer, draw, fit_on

RATE = partial(torch.optim.SGD, lr=1.0)
KFAC = partial(fit_kfac, cotangents="exact")


@pytest.mark.parametrize("options", [{}, {"preconditioner": KFAC}, {"group_ridge": {"stem": 10.0, "head": 0.3}}])
def test_the_optimum_of_the_exact_solvers_is_its_fixed_point(options):
    method = build(ridge=0.02, optimizer=RATE, normalize_step=True, **options)
    problem = dense(method, factors=options.get("group_ridge"))
    optimum = problem.optimum()
    with torch.no_grad():
        parts = optimum.split([delta.numel() for delta in method.linearized.deltas.values()])
        for delta, part in zip(method.linearized.deltas.values(), parts, strict=True):
            delta.copy_(part.view_as(delta))
    fit_on(build_trainer(3), method, TensorData(*draw(11)))
    assert (flat(method.linearized.deltas) - optimum).norm() < 1e-9 * optimum.norm()


def test_ordinary_batches_come_back_after_sweeps():
    data, trainers = TensorData(*draw(11), 4), [build_trainer(1) for _ in range(4)]
    fit_on(trainers[0], build(solver="cg"), data)
    assert trainers[0].num_training_batches == 6
    fit_on(trainers[1], build(solver="sgd"), data)
    assert trainers[1].num_training_batches == 3
    fit_on(trainers[2], build(solver="kernel"), data)
    assert data.sweeps == 1
    data.sweeps = 2  # as a run that failed may leave it
    fit_on(trainers[3], Finetune(build_backbone(), CLASSES, optimizer=RATE), data)
    assert trainers[3].num_training_batches == 3
