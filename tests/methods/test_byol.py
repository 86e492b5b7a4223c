import copy
from functools import partial

import pytest
import timm.optim
import torch
from lightning import Callback

from lqf_lightning._instantiate import instantiate
from lqf_lightning.methods import BYOL
from methods.paired import PairData, build, views
from methods.tensors import CLASSES, build_backbone, build_trainer, draw, fit_on, snapshot
from tiny import compose


def make(**options):
    return build(BYOL, **{"hidden_width": 8, "projection_width": 4, "momentum": 0.5, **options})


def train(method, number=12, batch_size=6, epochs=1, *callbacks):
    trainer = build_trainer(epochs, *callbacks)
    fit_on(trainer, method, PairData(*draw(number), batch_size))
    return trainer


def regression(prediction, target):
    cosine = (prediction * target).sum(1) / (prediction.norm(dim=1) * target.norm(dim=1))
    return (2 - 2 * cosine).mean()


def objective(method, images):
    """Both directions; the student sees each view in a batch of its own, the first one before."""
    first, second = views(images)
    predictions = [method.student(view).projection for view in (first, second)]
    targets = [method.teacher(view).projection for view in (first, second)]
    predictions = [method.predictor(prediction) for prediction in predictions]
    return regression(predictions[0], targets[1]) + regression(predictions[1], targets[0])


@pytest.mark.parametrize("teacher", ["eman", "ema", "ema_copied"])
def test_a_step_predicts_what_the_teacher_makes_of_the_other_view(teacher):
    method = make(teacher=teacher)
    twin, images = copy.deepcopy(method), draw(6)[0]
    trainer = train(method, 6)
    loss = objective(twin, images)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for name, parameter in twin.named_parameters():
        if parameter.requires_grad and not name.startswith("online"):
            expected = parameter - 0.1 * parameter.grad
            assert torch.allclose(method.get_parameter(name), expected, rtol=1e-9, atol=1e-12), name
            assert parameter.grad.norm() > 1e-9


class Losses(Callback):
    def __init__(self):
        self.values = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.values.append(pl_module.train_loss.compute().item())


def test_the_loss_is_between_zero_and_eight():
    losses = Losses()
    train(make(momentum=0.9), 12, 6, 15, losses)
    assert len(losses.values) == 30
    assert all(0 <= value <= 8 for value in losses.values)
    assert losses.values[-1] < losses.values[0]


def test_the_predictor_has_no_average():
    method = make()
    before = snapshot(method)
    train(method)
    state = method.state_dict()
    assert not any("predictor" in name for name in state if name.startswith("teacher."))
    assert not torch.equal(state["predictor.0.weight"], before["predictor.0.weight"])
    assert not torch.equal(state["teacher.model.projector.0.weight"], before["teacher.model.projector.0.weight"])
    names = {name.removeprefix("teacher.model.") for name in state if name.startswith("teacher.model.")}
    assert names == {name.removeprefix("student.") for name in state if name.startswith("student.")}


def lars_step(parameter, gradient, lr, decay, adapt):
    """You et al. 2017: the rate of a layer is in proportion to its weights; from weights of zero, plain descent."""
    adapt = adapt and parameter.norm() > 0
    share = 0.001 * parameter.norm() / (gradient.norm() + decay * parameter.norm()) if adapt else 1.0
    return parameter - lr * share * (gradient + decay * parameter)


@pytest.mark.parametrize("decay_all", [False, True])
def test_a_step_of_lars_leaves_biases_and_normalization_out_unless_asked(decay_all):
    lars = partial(timm.optim.Lars, lr=1.8, momentum=0.9, weight_decay=0.1, trust_coeff=0.001)
    method = make(optimizer=lars, decay_all=decay_all, group_lr={"projector": 2, "stage1": 3})
    twin, images = copy.deepcopy(method), draw(6)[0]
    train(method, 6)
    objective(twin, images).backward()
    seen = set()
    for name, parameter in twin.named_parameters():
        if not parameter.requires_grad or name.startswith("online"):
            continue
        factor = 2 if "projector" in name else 3 if ".conv2." in name or ".bn2." in name else 1
        adapt = decay_all or parameter.ndim > 1
        seen.add((factor, adapt, parameter.ndim > 1))
        with torch.no_grad():
            expected = lars_step(parameter, parameter.grad, factor * 1.8, 0.1 if adapt else 0.0, adapt)
        assert torch.allclose(method.get_parameter(name), expected, rtol=1e-7, atol=1e-10), name
    assert len(seen) == 6  # every factor, for weights and for scales


def test_the_options_of_its_file_leave_normalization_out():
    config = compose("method=byol", "data.batch_size=4", "paths.output_dir=unused", "method.hidden_width=8")
    method = instantiate(config, "method", backbone=build_backbone(), classes=CLASSES)
    optimizer = method.make_optimizer(list(method.groups()))
    assert isinstance(optimizer, timm.optim.Lars)
    scale = method.student.projector[1].weight
    (group,) = [g for g in optimizer.param_groups if any(p is scale for p in g["params"])]
    assert (group["name"], group["weight_decay"], group["always_adapt"]) == ("projector_no_decay", 0.0, False)
    assert method.teacher.momentum.shape == "cosine"
