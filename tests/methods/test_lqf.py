import math
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

from lqf_lightning.linear import KFAC
from lqf_lightning.methods import LQF
from methods.dense_lqf import (
    ALPHA,
    EXACT,
    RATE,
    RIDGE,
    SGD,
    DenseProblem,
    build,
    flat,
    jacobian,
    outputs_at_start,
    penalized,
    scatter_deltas,
    split,
)  # fmt: skip
from methods.tensors import CLASSES, TensorData, build_backbone, build_trainer, draw, fit, fit_on, snapshot


def test_before_training_it_is_the_pre_trained_network():
    images, _ = draw(9)
    assert torch.allclose(build()(images), outputs_at_start(images), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("layers", [None, ["head"], ["stage1", "head"]])
def test_it_predicts_the_first_order_expansion(layers):
    method, (images, _) = build(layers=layers), draw(9)
    dw = scatter_deltas(method)
    expected = outputs_at_start(images) + jacobian(images, list(method.linearized.deltas)) @ dw
    assert torch.allclose(method(images), expected, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("training", [True, False])
def test_predictions_do_not_depend_on_the_rest_of_the_batch(training):
    method, (images, _) = build().train(training), draw(9)
    scatter_deltas(method)
    together = method(images)
    alone = torch.cat([method(image[None]) for image in images])
    assert torch.allclose(together, alone, rtol=1e-12, atol=1e-13)
    assert torch.allclose(method(images.flip(0)).flip(0), together, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("layers", [None, ["head"]])
def test_one_step_is_the_closed_form_gradient_penalty_included(layers):
    method, (images, target) = build(layers=layers), draw(7)
    dw = scatter_deltas(method)
    rows = jacobian(images, list(method.linearized.deltas))
    residual = outputs_at_start(images) + rows @ dw - ALPHA * one_hot(target, 3)
    penalty = RIDGE * dw * penalized(list(method.linearized.deltas))
    gradient = torch.einsum("bcp,bc->p", rows, residual) / 7 + penalty
    fit(method, images, target)
    assert torch.allclose(flat(method.linearized.deltas), dw - RATE * gradient, rtol=1e-10, atol=1e-13)
    assert penalty.norm() > 0.01 * gradient.norm()  # the penalty is no rounding error of the comparison


def test_cross_entropy_takes_the_place_of_the_squared_loss():
    method, (images, target) = build(loss="cross_entropy"), draw(7)
    dw = scatter_deltas(method).requires_grad_()
    rows = jacobian(images, list(method.linearized.deltas))
    objective = cross_entropy(outputs_at_start(images) + rows @ dw, target)
    objective = objective + RIDGE / 2 * (penalized(list(method.linearized.deltas)) * dw.square()).sum()
    (gradient,) = torch.autograd.grad(objective, dw)
    fit(method, images, target)
    assert torch.allclose(flat(method.linearized.deltas), dw - RATE * gradient, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("layers", [None, ["head"]])
def test_enough_steps_reach_the_optimum(layers):
    method, (images, target) = build(layers=layers, optimizer=partial(torch.optim.SGD, lr=1.0)), draw(6)
    names = list(method.linearized.deltas)
    rows = jacobian(images, names).flatten(0, 1)
    steepest = torch.linalg.matrix_norm(rows, 2).item() ** 2 / 6
    method.ridge = 0.2 * steepest
    method.make_optimizer = partial(torch.optim.SGD, lr=1 / (steepest + method.ridge))
    problem = DenseProblem(images, target, names, 6 * method.ridge)
    flattest = torch.linalg.eigvalsh(problem.hessian / 6)[0].item()
    slowest = 1 - flattest / (steepest + method.ridge)  # what a step leaves of the error
    fit(method, images, target, epochs=math.ceil(math.log(1e-12) / math.log(slowest)))
    expected = problem.optimum()
    assert (flat(method.linearized.deltas) - expected).norm() < 1e-10 * expected.norm()


def test_a_linear_head_reaches_the_ridge_solution_in_one_preconditioned_step():
    one = partial(torch.optim.SGD, lr=1.0)
    options = {"layers": ["head"], "intercept": False, "preconditioner": EXACT}
    method, (images, target) = build(optimizer=one, **options), draw(12)
    scatter_deltas(method)  # from wherever it starts
    fit(method, images, target)
    features = nn.Sequential(*list(build_backbone().model)[:-1]).eval()(images).detach()
    inputs = torch.cat([features, torch.ones(12, 1, dtype=torch.float64)], 1)
    residual = outputs_at_start(images) - ALPHA * one_hot(target, 3)
    inverse = torch.linalg.inv(inputs.T @ inputs / 12 + RIDGE * torch.eye(4, dtype=torch.float64))
    expected = -(residual.T @ inputs / 12) @ inverse
    deltas = method.linearized.deltas
    assert torch.allclose(torch.cat([deltas["fc.weight"], deltas["fc.bias"][:, None]], 1), expected, rtol=1e-10)


def test_the_penalty_enters_before_the_preconditioner():
    method, (images, target) = build(preconditioner=EXACT), draw(7)
    dw = scatter_deltas(method)
    rows = jacobian(images, list(method.linearized.deltas))
    residual = outputs_at_start(images) + rows @ dw - ALPHA * one_hot(target, 3)
    data, penalty = (
        torch.einsum("bcp,bc->p", rows, residual) / 7,
        RIDGE * dw * penalized(list(method.linearized.deltas)),
    )
    kfac: KFAC = EXACT(build_backbone().model, None, [images], damping=RIDGE)
    fit(method, images, target)
    step = flat(kfac.precondition(split(data + penalty, method)))
    wrong = flat(kfac.precondition(split(data, method))) + penalty
    assert torch.allclose(flat(method.linearized.deltas), dw - RATE * step, rtol=1e-10, atol=1e-13)
    assert (step - wrong).norm() > 1e-2 * step.norm()


@pytest.mark.parametrize(("wanted", "used"), [(1, 1), (6, 6), (None, 12), (100, 12)])
def test_factors_come_from_random_training_samples(wanted, used):
    method = build(preconditioner=EXACT, preconditioner_samples=wanted)
    images, target = draw(12)
    trainer = build_trainer(1)
    fit_on(trainer, method, TensorData(images, target, 4))
    chosen = torch.randperm(12, generator=torch.Generator().manual_seed(0))[:used]
    expected = EXACT(build_backbone().model, None, [images[chosen]], damping=RIDGE)
    assert set(method.solver.kfac.factors) == set(expected.factors)
    for name, layer in expected.factors.items():
        assert torch.allclose(method.solver.kfac.factors[name].inputs, layer.inputs, rtol=1e-12)
        assert torch.allclose(method.solver.kfac.factors[name].outputs, layer.outputs, rtol=1e-12)


def test_training_moves_dw_and_nothing_else():
    method = build(optimizer=partial(torch.optim.AdamW, lr=0.01, weight_decay=0.0), layers=["stage1", "head"])
    before, images_and_target = snapshot(method), draw(8)
    fit(method, *images_and_target, epochs=2, batch_size=4)
    moved = {name for name, value in method.state_dict().items() if not torch.equal(before[name], value)}
    names = ("conv2.weight", "bn2.weight", "bn2.bias", "fc.weight", "fc.bias")
    assert moved == {f"linearized.dw.{name}" for name in names}
    assert sum(p.numel() for p in method.parameters() if p.requires_grad) == 54 + 3 + 3 + 9 + 3


def test_rates_of_groups_apply_to_their_dw():
    method, (images, target) = build(group_lr={"stem": 0.0, "head": 3.0}, ridge=0.0), draw(7)
    rows = jacobian(images, list(method.linearized.deltas))
    residual = outputs_at_start(images) - ALPHA * one_hot(target, 3)
    gradient = split(torch.einsum("bcp,bc->p", rows, residual) / 7, method)
    fit(method, images, target)
    factors = {"conv1": 0.0, "bn1": 0.0, "conv2": 1.0, "bn2": 1.0, "fc": 3.0}
    for name, delta in method.linearized.deltas.items():
        assert torch.allclose(delta, -RATE * factors[name.split(".")[0]] * gradient[name], rtol=1e-10, atol=1e-14)


def test_the_reported_loss_is_the_data_term():
    method, (images, target) = build(), draw(7)
    dw = scatter_deltas(method)
    outputs = outputs_at_start(images) + jacobian(images, list(method.linearized.deltas)) @ dw
    expected = (outputs - ALPHA * one_hot(target, 3)).square().sum() / 14
    trainer = fit(method, images, target)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(expected.item(), rel=1e-6)
    share = (outputs.argmax(-1) == target).double().mean().item()
    assert trainer.callback_metrics["train/acc"].item() == pytest.approx(share, rel=1e-6)


def test_a_loss_that_is_no_number_ends_the_run_with_the_rate_that_was_asked_for():
    from lqf_lightning.methods.schedule import cosine

    images, target = draw(6)
    images[2, 0, 0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match=r"epoch 0 is nan.*method\.optimizer\.lr, now 0\.02"):
        fit(build(scheduler=cosine), images, target, epochs=2)


@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, partial(SGD, weight_decay=0.1)])
def test_weight_decay_of_the_optimizer_is_refused(optimizer):
    with pytest.raises(ValueError, match=r"weight_decay \{0\.\d+\}\. Set method\.optimizer\.weight_decay=0"):
        fit(build(optimizer=optimizer), *draw(6))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ridge": -1e-3}, r"got -0\.001\. Set method\.ridge"),
        ({"ridge": float("nan")}, r"got nan\. Set method\.ridge"),
        ({"target_scale": 0}, r"got 0\. Set method\.target_scale"),
        ({"loss": "mse"}, r"'mse'\. Set method\.loss=squared"),
        ({"preconditioner_samples": 0}, r"got 0\. Set method\.preconditioner_samples"),
    ],
)
def test_wrong_options_name_the_override(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def test_a_checkpoint_brings_back_dw_and_the_expansion_point(tmp_path):
    method, (images, target) = build(), draw(6)
    trainer = fit(method, images, target, epochs=2)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    other = LQF(build_backbone(seed=3), CLASSES, optimizer=SGD)
    assert not torch.allclose(other(images), method(images))
    other.load_state_dict(torch.load(tmp_path / "run.ckpt", weights_only=True)["state_dict"])
    assert torch.equal(other(images), method(images))


def test_a_normalized_rate_below_two_is_stable_and_one_above_is_stopped():
    steps = {rate: partial(torch.optim.SGD, lr=rate) for rate in (1.9, 2.1)}
    method, (images, target) = build(optimizer=steps[1.9], normalize_step=True, ridge=1e-3), draw(12)
    start = scatter_deltas(method).norm()
    fit(method, images, target, epochs=300)
    assert flat(method.linearized.deltas).norm() < 1e3 * start
    with pytest.raises(FloatingPointError, match=r"training diverges\. Set method\.optimizer\.lr lower"):
        fit(build(optimizer=steps[2.1], normalize_step=True, ridge=1e-3), images, target, epochs=300)


def test_normalized_steps_are_plain_ones_at_a_rate_divided_by_the_curvature():
    images, target = draw(12)
    normalized = build(optimizer=partial(torch.optim.SGD, lr=0.5), normalize_step=True)
    fit(normalized, images, target, epochs=3)
    plain = build(optimizer=partial(torch.optim.SGD, lr=0.5 / normalized.solver.top_curvature))
    fit(plain, images, target, epochs=3)
    assert normalized.solver.top_curvature > 1
    moved = flat(plain.linearized.deltas)
    assert torch.allclose(flat(normalized.linearized.deltas), moved, rtol=1e-9, atol=1e-12 * moved.norm().item())
