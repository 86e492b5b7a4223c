import math
from functools import partial

import pytest
import torch

from lqf_lightning.analysis.linear_twin import linear_twin, refuse_method, training_time
from lqf_lightning.methods import LQF, Finetune
from lqf_lightning.methods.schedule import cosine
from methods.dense_lqf import EXACT, build
from methods.tensors import CLASSES, SGD, build_backbone, build_trainer


def tuned(optimizer=SGD, **options):
    return Finetune(build_backbone(), CLASSES, optimizer=optimizer, **options)


def test_the_time_of_constant_steps_is_their_number_times_the_rate_and_the_effect_of_momentum():
    assert training_time(tuned(), 7) == pytest.approx(0.7)
    assert training_time(tuned(partial(torch.optim.SGD, lr=0.1, momentum=0.9)), 7) == pytest.approx(7.0)


def test_the_time_of_a_schedule_is_the_sum_of_its_rates():
    # Without warm-up half a cosine over 4 steps: factors 1, cos^2(pi/8), 1/2, sin^2(pi/8), that is 2.5 in all.
    method = tuned(scheduler=partial(cosine, warmup=0.0))
    assert training_time(method, 4) == pytest.approx(0.1 * 2.5)


def test_a_run_that_stopped_early_has_the_first_rates_of_its_schedule():
    method = tuned(scheduler=partial(cosine, warmup=0.0))
    assert training_time(method, 2, 4) == pytest.approx(0.1 * (1 + math.cos(math.pi / 8) ** 2))


def test_steps_of_other_optimizers_are_no_time():
    assert training_time(tuned(torch.optim.AdamW), 7) is None


def test_lqf_is_its_own_twin():
    method = build(solver="kernel")
    assert linear_twin(method) is method
    assert refuse_method(method)


def test_the_twin_has_the_layers_and_targets_of_the_run_and_leaves_its_network_alone():
    method = tuned(layers=["stage1", "head"], target_scale=7.0, loss="squared")
    trainer = build_trainer(1)  # referred to weakly
    method.trainer = trainer
    start = build_backbone(seed=3)
    before = torch.random.get_rng_state()
    twin = linear_twin(method, start)
    assert isinstance(twin, LQF)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert sorted(twin.linearized.deltas) == sorted([*start.groups["stage1"], *start.groups["head"]])
    assert twin.target_scale == 7.0
    assert torch.equal(twin.linearized.model.fc.weight, start.model.fc.weight)
    assert all(parameter.requires_grad for parameter in start.model.parameters())
    assert not torch.equal(method.model.fc.weight, start.model.fc.weight)


@pytest.mark.parametrize(
    ("options", "text"),
    [({"loss": "cross_entropy"}, "Set method.loss=squared"), ({"ridge": 0.0}, "Set method.ridge=1e-3")],
)
def test_problems_without_a_closed_form_are_refused(options, text):
    with pytest.raises(ValueError, match=text):
        refuse_method(build(**options))


def test_a_learned_penalty_is_one_by_layer_groups_and_the_curvature_is_not():
    assert refuse_method(build(solver="cg", ridge="auto", metric="learned"))
    with pytest.raises(ValueError, match=r"got metric='kfac'. Set method\.metric=identity, or learned"):
        refuse_method(build(solver="cg", metric="kfac", preconditioner=EXACT))
