import io
from functools import partial

import pytest
import torch

from lqf_lightning.linear import fit_kfac
from lqf_lightning.methods.solvers.problem_key import is_same_problem, problem_key
from methods.dense_lqf import build
from methods.solvers.runs import solve


def key(**options):
    method = build(**{"solver": "cg", "ridge": 0.02, **options})
    solve(method, epochs=1)
    return problem_key(method, method.solver.table, "none", method.solver.descent.metric)


def test_a_problem_is_the_same_after_a_checkpoint_and_up_to_rounding():
    file, own = io.BytesIO(), key()
    torch.save(own, file)
    file.seek(0)
    assert is_same_problem(torch.load(file, weights_only=True), own)
    assert is_same_problem(own | {"initial": own["initial"] * (1 + 1e-6)}, own)
    assert is_same_problem(key(), own)


@pytest.mark.parametrize(
    "options", [{"ridge": 0.021}, {"target_scale": 4.0}, {"group_ridge": {"stem": 2.0}}, {"intercept": False}]
)
def test_another_penalty_or_target_is_another_problem(options):
    assert not is_same_problem(key(**options), key())


def test_other_factors_are_another_metric():
    def kfac(cotangents):
        return key(metric="kfac", preconditioner=partial(fit_kfac, cotangents=cotangents))

    own, other = kfac("exact"), kfac("random")
    assert is_same_problem(kfac("exact"), own)
    assert not is_same_problem(other, own)
    assert is_same_problem(other | {"metric_norm": own["metric_norm"]}, own)  # nothing else tells them apart


@pytest.mark.parametrize("name", ["index", "label", "initial"])
def test_another_sample_is_another_problem(name):
    own = key()
    changed = own[name].clone()
    changed[3] += 1
    assert not is_same_problem(own | {name: changed}, own)
    assert not is_same_problem(own | {name: own[name][:-1]}, own)


def test_no_key_is_another_problem():
    assert not is_same_problem({}, key())
