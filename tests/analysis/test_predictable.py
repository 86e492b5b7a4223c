import logging
from types import SimpleNamespace

import pytest
import torch

from lqf_lightning.analysis.optimizer_steps import optimizer_steps, refuse_optimizer
from lqf_lightning.analysis.predictable import refuse_unpredictable, tell_what_is_not_modeled
from lqf_lightning.methods import LQF, Finetune, Method
from methods.tensors import CLASSES, SGD, build_backbone


def trainer(**options):
    return SimpleNamespace(**({"accumulate_grad_batches": 1, "gradient_clip_val": None} | options))


@pytest.mark.parametrize(
    ("options", "fix"),
    [
        ({"accumulate_grad_batches": 2}, r"trainer\.accumulate_grad_batches=1"),
        ({"gradient_clip_val": 1.0}, r"trainer\.gradient_clip_val=null"),
    ],
)
def test_options_of_the_trainer_that_bend_steps_are_refused(options, fix):
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    refuse_unpredictable(method, trainer())
    with pytest.raises(ValueError, match=fix):
        refuse_unpredictable(method, trainer(**options))


@pytest.mark.parametrize("solver", ["cg", "kernel"])
def test_solvers_that_take_no_such_steps_are_refused(solver):
    method = LQF(build_backbone(), CLASSES, optimizer=SGD, solver=solver)
    with pytest.raises(ValueError, match=r"method\.solver=sgd"):
        refuse_unpredictable(method, trainer())


def test_other_methods_are_refused():
    with pytest.raises(ValueError, match="method=finetune"):
        refuse_unpredictable(Method(build_backbone(), CLASSES, optimizer=SGD), trainer())


@pytest.mark.parametrize(
    "build",
    [
        torch.optim.AdamW,
        lambda p: torch.optim.SGD(p, 0.1, momentum=0.5, dampening=0.1),
        lambda p: torch.optim.SGD(p, 0.1, maximize=True),
    ],
)
def test_other_optimizers_are_refused(build):
    with pytest.raises(ValueError, match=r"Set method[/.]optimizer"):
        refuse_optimizer(build([torch.nn.Parameter(torch.zeros(1))]))


def attached(method, steps, scheduler=None):
    """A method with an optimizer, as a trainer holds them when training starts."""
    optimizer = SGD(list(method.groups()))
    for group in optimizer.param_groups:
        group["lr"] *= method.group_lr.get(group["name"], 1.0)
    configs = []
    if scheduler is not None:
        configs = [
            SimpleNamespace(scheduler=scheduler(optimizer), interval="step", frequency=1, reduce_on_plateau=False)
        ]
    method._trainer = SimpleNamespace(
        optimizers=[optimizer], lr_scheduler_configs=configs, estimated_stepping_batches=steps
    )
    return optimizer


@pytest.mark.parametrize(
    "scheduler",
    [
        lambda o: torch.optim.lr_scheduler.LambdaLR(o, lambda t: 1 / (t + 1)),
        lambda o: torch.optim.lr_scheduler.StepLR(o, 3, 0.5),
        lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 7),
    ],
)
def test_the_rates_are_those_that_the_schedule_is_going_to_give(scheduler):
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD, group_lr={"head": 4.0, "stem": 0.0})
    optimizer = attached(method, 7, scheduler)
    found = optimizer_steps(method)
    expected = []
    for _ in range(7):
        expected.append(optimizer.param_groups[2]["lr"])
        optimizer.step()
        method._trainer.lr_scheduler_configs[0].scheduler.step()
    torch.testing.assert_close(found.rule.rates, torch.tensor(expected, dtype=torch.float64), rtol=1e-12, atol=0)
    assert {group.factor: set(group.names) for group in found.groups} == {
        0.25: {"conv2.weight", "bn2.weight", "bn2.bias"}, 1.0: {"fc.weight", "fc.bias"},
    }  # fmt: skip


def test_rates_that_do_not_keep_their_proportion_are_refused():
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    constant, falling = (lambda t: 1.0), (lambda t: 1 / (t + 1))
    attached(method, 4, lambda o: torch.optim.lr_scheduler.LambdaLR(o, [constant, constant, falling]))
    with pytest.raises(ValueError, match="fixed proportion"):
        optimizer_steps(method)


def test_the_penalty_of_lqf_is_decay_of_its_groups_and_spares_the_intercept():
    method = LQF(build_backbone(), CLASSES, optimizer=SGD, ridge=0.5, group_ridge={"head": 3.0}, normalize_step=False)
    attached(method, 2)
    found = {name: group.decay for group in optimizer_steps(method).groups for name in group.names}
    assert found["conv1.weight"] == 0.5
    assert found["fc.weight"] == 1.5
    assert found["fc.bias"] == 0.0


@pytest.mark.parametrize(
    ("random", "batch_norm", "lines"), [(True, "frozen", 1), (False, "train", 1), (False, "frozen", 0)]
)
def test_what_a_forecast_leaves_out_is_said(random, batch_norm, lines, caplog):
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD, batch_norm=batch_norm)
    data = SimpleNamespace(training_transform=SimpleNamespace(random=random))
    with caplog.at_level(logging.INFO):
        tell_what_is_not_modeled(method, SimpleNamespace(datamodule=data))
    assert len([r for r in caplog.records if "training time is predicted" in r.getMessage()]) == lines
