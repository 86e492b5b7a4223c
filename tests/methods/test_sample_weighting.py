import json
from functools import partial
from itertools import pairwise

import pandas as pd
import pytest
import torch
from lightning import Callback
from torch.nn.functional import cross_entropy, one_hot

from linear.problems import near
from lqf_lightning.methods import Finetune
from lqf_lightning.methods.losses import scaled_squared_loss
from methods.dense_lqf import ALPHA, build, flat, jacobian, outputs_at_start, penalized
from methods.solvers.runs import Note
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on, gradient
from tiny import run_tiny

WEIGHTS = torch.tensor([2.0, 0.0, 1.0, 0.3, 1.7, 5.0, 1.0, 0.0, 0.9, 1.1, 0.4], dtype=torch.float64)


def weighted_data(weights=WEIGHTS, batch_size=4):
    data = TensorData(*draw(len(weights)), batch_size)
    data.sample_weights = weights
    return data


def weighted_ridge(ridge, names, weights=WEIGHTS):
    """The normal equations of the weighted problem; the ridge counts once per sample, whatever they weigh."""
    images, target = draw(len(weights))
    rows = jacobian(images, names)
    residual = ALPHA * one_hot(target, 3) - outputs_at_start(images)
    hessian = torch.einsum("i,icp,icq->pq", weights, rows, rows) + len(weights) * ridge * torch.diag(penalized(names))
    return torch.linalg.solve(hessian, torch.einsum("i,icp,ic->p", weights, rows, residual))


class Losses(Callback):
    def __init__(self):
        self.losses = []

    def on_train_epoch_end(self, trainer, pl_module):
        self.losses.append(float(trainer.callback_metrics["train/loss"]))


def solved(note=None, **options):
    method = build(ridge=0.02, **options)
    fit_on(build_trainer(200, *([note] if note else [])), method, weighted_data())
    return method


@pytest.mark.parametrize(
    "options", [{"solver": "kernel"}, {"solver": "cg", "tolerance": 1e-11}], ids=lambda o: o["solver"]
)
def test_exact_solvers_find_the_weighted_ridge_fit(options):
    note = Note()
    method = solved(note, **options)
    got = flat(method.linearized.deltas)
    assert near(got, weighted_ridge(0.02, list(method.linearized.deltas)), 1e-8)
    images, target = draw(11)
    outputs = outputs_at_start(images) + jacobian(images, list(method.linearized.deltas)) @ got
    losses = 0.5 * (outputs - ALPHA * one_hot(target, 3)).square().sum(1)
    assert note.rows[-1]["train/loss"] == pytest.approx(float((WEIGHTS * losses).mean()), rel=1e-5)
    right = (outputs.argmax(1) == target).double().mean()  # every sample once
    assert note.rows[-1]["train/acc"] == pytest.approx(float(right), rel=1e-5)


def test_a_solution_for_other_weights_is_not_taken_for_this_one(tmp_path):
    first, second = (build(ridge=0.02, solver="kernel") for _ in range(2))
    trainer = build_trainer(1)
    fit_on(trainer, first, weighted_data())
    trainer.save_checkpoint(tmp_path / "first.ckpt")
    other = torch.ones_like(WEIGHTS)
    fit_on(build_trainer(2), second, weighted_data(other), ckpt_path=tmp_path / "first.ckpt", weights_only=True)
    assert near(flat(second.linearized.deltas), weighted_ridge(0.02, list(second.linearized.deltas), other), 1e-8)


@pytest.mark.parametrize("loss", ["cross_entropy", "squared"])
def test_a_weight_of_two_pulls_like_two_samples(loss):
    images, target = draw(5)
    doubled = [0, 0, 1, 2, 4]  # the first twice, the fourth not at all
    weights = torch.tensor([2.0, 1.0, 1.0, 0.0, 1.0], dtype=torch.float64)
    method = Finetune(build_backbone(), CLASSES, optimizer=SGD, loss=loss, target_scale=3.0, batch_norm="frozen")
    method.model.drop.p = 0.0
    objective = cross_entropy if loss == "cross_entropy" else partial(scaled_squared_loss, scale=3.0)
    model = method.model.eval()
    steps = gradient(lambda model: objective(model(images[doubled]), target[doubled]), model)
    before = {name: value.clone() for name, value in model.named_parameters()}
    fit_on(build_trainer(1), method, weighted_data(weights, 5))
    for name, value in model.named_parameters():
        assert torch.allclose(value, before[name] - 0.1 * steps[name], rtol=1e-12, atol=1e-15), name


def test_stochastic_steps_on_the_linearized_network_are_weighted_too():
    method = build(solver="sgd", ridge=0.0, optimizer=partial(torch.optim.SGD, lr=0.01), intercept=False)
    fit_on(build_trainer(1), method, weighted_data(batch_size=11))
    images, target = draw(11)
    rows = jacobian(images, list(method.linearized.deltas))
    residual = outputs_at_start(images) - ALPHA * one_hot(target, 3)
    expected = -0.01 / 11 * torch.einsum("i,icp,ic->p", WEIGHTS, rows, residual)
    assert near(flat(method.linearized.deltas), expected, 1e-10)


def test_heavy_samples_do_not_make_normalized_steps_diverge():
    note = Losses()
    heavy = torch.tensor([200.0] + [1.0] * 10, dtype=torch.float64)
    method = build(solver="sgd", ridge=1e-3, optimizer=partial(torch.optim.SGD, lr=1.5), normalize_step=True)
    fit_on(build_trainer(30, note), method, weighted_data(heavy, 11))
    losses = note.losses
    assert all(later <= earlier * (1 + 1e-6) for earlier, later in pairwise(losses))
    assert losses[-1] < 0.5 * losses[0]


def test_a_method_that_cannot_weigh_samples_says_so():
    class Plain(Finetune):
        weighs_samples = False

    method = Plain(build_backbone(), CLASSES, optimizer=SGD, batch_norm="frozen")
    with pytest.raises(ValueError, match=r"Plain cannot weigh samples.*Set data\.weights=null"):
        fit_on(build_trainer(1), method, weighted_data())
    fit_on(build_trainer(1), method, TensorData(*draw(11), 4))


@pytest.mark.parametrize(
    "options",
    [["method=fixmatch"], ["method=moco", "method.queue_size=24"], ["method=self_distillation"]],
    ids=lambda options: options[0],
)
def test_presets_that_cannot_weigh_samples_refuse_weights(options, folder_of_shapes, tmp_path):
    path = tmp_path / "weights.csv"
    pd.DataFrame({"path": ["train/red/000.png"], "weight": [3.0]}).to_csv(path, index=False)
    with pytest.raises(ValueError, match="cannot weigh samples"):
        run_tiny(tmp_path / "run", folder_of_shapes, f"data.weights={path}", *options)


def test_weights_and_a_subset_give_the_same_run_on_every_number_of_ranks(folder_of_shapes, tmp_path):
    paths = [f"train/{name}/{number:03d}.png" for name in ("blue", "green", "red") for number in range(7)]
    pd.DataFrame({"path": paths}).to_parquet(tmp_path / "subset.parquet")
    weights = pd.DataFrame({"path": paths[::2], "weight": [0.2 * k for k in range(len(paths[::2]))]})
    weights.to_csv(tmp_path / "w.csv", index=False)
    files = [f"data.subset={tmp_path / 'subset.parquet'}", f"data.weights={tmp_path / 'w.csv'}"]
    solver = [
        "method=lqf_sgd",
        "method.solver=kernel",
        "method.layers=[head]",
        "method.ridge=0.1",
        "trainer.precision=64-true",
        "callbacks=[]",
    ]
    results = {}
    for world in (1, 2, 3):
        ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={world}", "trainer.strategy=ddp_fork"]
        run_tiny(tmp_path / str(world), folder_of_shapes, *(ranks if world > 1 else []), *files, *solver)
        results[world] = json.loads((tmp_path / str(world) / "metrics.json").read_text())
    used = pd.read_parquet(tmp_path / "3" / "manifest.parquet")
    assert used.loc[used["used"] & (used["split"] == "train"), "path"].tolist() == paths
    for world in (2, 3):
        for name, value in results[1].items():
            if not name.startswith("time/"):
                assert results[world][name] == pytest.approx(value, rel=1e-6, abs=1e-6, nan_ok=True), name
    with pytest.raises(ValueError, match=r"data\.subset=.*cannot go on with data\.subset=None"):
        run_tiny(tmp_path / "1", folder_of_shapes, files[1], *solver, "ckpt_path=auto")
