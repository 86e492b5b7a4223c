import json
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, linear

from lqf_lightning.data import Batch
from lqf_lightning.evaluate import evaluate
from lqf_lightning.methods.finetune import Finetune
from lqf_lightning.methods.focal_distillation import FocalDistillation
from lqf_lightning.teachers import EnsembleTeacher, FrozenTeacher, StoredPredictions, View
from methods.tensors import (
    CLASSES,
    SGD,
    TensorData,
    build_backbone,
    build_trainer,
    draw,
    fit,
    fit_on,
    gradient,
    snapshot,
)
from ranks import run_on_ranks
from tiny import compose, run_tiny

VIEW = View(6, 1.0, (0.5,) * 3, (0.5,) * 3)
FOREIGN = ["cat", "dodo", "ant"]  # an old model that knows no bees


def teach(seed=7, classes=CLASSES, view=VIEW):
    """An old model whose outputs are large enough to be told apart."""
    backbone = build_backbone(seed)
    with torch.no_grad():
        backbone.model.fc.weight.mul_(4)
    return FrozenTeacher(backbone.model, classes, view, f"old{seed}", backbone)


def build(**options):
    """The method around the tiny network, without dropout."""
    given = {"optimizer": SGD, "batch_norm": "frozen", "reference": teach(), **options}
    method = FocalDistillation(build_backbone(), CLASSES, **given)
    method.model.drop.p = 0.0
    return method


def ready(**options):
    """The method as a trainer leaves it before the first batch."""
    method = build(**options)
    method.trainer = build_trainer(1)
    method.log = lambda *_, **__: None
    method.setup("fit")
    method.on_fit_start()
    return method


def batch_of(number):
    images, target = draw(number)
    return Batch(images, target, torch.arange(number))


def pull(method, batch):
    """Gradient of the objective with respect to the outputs, without that of the labels; and the outputs."""
    logits = method(batch.input).detach().requires_grad_()
    (whole,) = torch.autograd.grad(method.training_loss(logits, batch), logits)
    (labels,) = torch.autograd.grad(cross_entropy(logits, batch.target), logits)
    return whole - labels, logits.detach()


def squared(new, old):
    return (new - old).square().mean(-1)


def tempered(new, old):
    log_new, log_old = (new / 3).log_softmax(-1), (old / 3).log_softmax(-1)
    return 9 * (log_old.exp() * (log_old - log_new)).sum(-1)


def risen(new, old):
    return (new - old).clamp(min=0).square()


def best(old):
    return old > old.amin(-1, keepdim=True)  # two of three


FORMULAS = {  # options, and the objective by new outputs, old outputs, losses and whether the old model is right
    "default": ({}, lambda new, old, ce, r: (ce + (1 + 5 * r) * squared(new, old)).mean()),
    "kl": (
        {"distance": "kl", "temperature": 3.0, "strength": 2.0, "alpha": 0.5, "beta": 3.0},
        lambda new, old, ce, r: (ce + 2 * (0.5 + 3 * r) * tempered(new, old)).mean(),
    ),
    "half sum": (
        {"class_reduction": "sum", "beta": 0.0},
        lambda new, old, ce, r: (ce + 1.5 * squared(new, old)).mean(),
    ),
    "centered": (
        {"centered": True},
        lambda new, old, ce, r: (ce + (1 + 5 * r) * squared(new - new.mean(1, True), old - old.mean(1, True))).mean(),
    ),
    "inhibition": (
        {"distance": "ldi", "margin": 0.1, "power": 3.0, "mixing": "released", "distillation_share": 0.8}
        | {"filter": "all"},
        lambda new, old, ce, r: (0.2 * ce + 0.8 * 6 * ((new - old).abs() - 0.1).clamp(min=0).pow(3).mean(1)).mean(),
    ),
    "inhibition of the best": (
        {"distance": "ldi", "top_k": 2, "one_sided": True, "alpha": 0.0},
        lambda new, old, ce, r: (ce + 5 * r * (risen(new, old) * best(old)).sum(1) / 2).mean(),
    ),
    "naive": ({"distance": "none", "strength": 2.0}, lambda new, old, ce, r: ((1 + 2 * r) * ce).mean()),
}  # fmt: skip


@pytest.mark.parametrize("name", FORMULAS)
def test_a_step_follows_the_gradient_of_the_formula(name):
    options, formula = FORMULAS[name]
    images, target = draw(13)
    old = teach()(images)
    right = (old.argmax(-1) == target).double()
    assert 0 < right.mean() < 1

    def objective(model):
        new = model(images)
        return formula(new, old, cross_entropy(new, target, reduction="none"), right)

    method = build(**options)
    model, before = method.model.eval(), snapshot(method)
    steps = gradient(objective, model)
    fit(method, images, target)
    for key, step in steps.items():
        expected = before[f"model.{key}"] - 0.1 * step
        assert torch.allclose(model.get_parameter(key), expected, rtol=1e-10, atol=1e-13), key
        assert step.norm() > 1e-5


@pytest.mark.parametrize(
    "options", [{"influence": 0.0, "strength": 0.0}, {"mixing": "released", "distillation_share": 0.0}]
)
def test_without_a_share_of_the_distance_it_is_finetuning(options):
    method, plain = build(**options), Finetune(build_backbone(), CLASSES, optimizer=SGD, batch_norm="frozen")
    plain.model.drop.p = 0.0
    for each in (method, plain):
        fit(each, *draw(13), epochs=2, batch_size=5)
    for name, value in plain.state_dict().items():
        assert torch.allclose(method.state_dict()[name], value, rtol=1e-12, atol=1e-15), name


@pytest.mark.parametrize("distance", ["logits", "kl", "ldi"])
def test_without_alpha_a_sample_that_the_old_model_gets_wrong_is_not_pulled_at_all(distance):
    method, batch = ready(distance=distance, alpha=0.0), batch_of(13)
    pulled, _ = pull(method, batch)
    right = teach()(batch.input).argmax(-1) == batch.target
    assert torch.equal(pulled[~right], torch.zeros_like(pulled[~right]))
    assert pulled[right].norm(dim=1).min() > 1e-4


def test_a_perfect_old_model_makes_the_weight_a_factor():
    images, _ = draw(13)
    batch = Batch(images, teach()(images).argmax(-1), torch.arange(13))
    single, _ = pull(ready(alpha=1.0, beta=0.0), batch)
    scaled, _ = pull(ready(alpha=0.5, beta=4.0), batch)
    assert torch.allclose(scaled, 4.5 * single, rtol=1e-9, atol=1e-15)


@pytest.mark.parametrize("distance", ["logits", "kl", "ldi"])
def test_an_old_model_that_is_the_new_one_does_not_pull(distance):
    backbone = build_backbone()
    pulled, _ = pull(
        ready(distance=distance, reference=FrozenTeacher(backbone.model, CLASSES, VIEW, "same")), batch_of(9)
    )
    assert pulled.abs().max() < 1e-14


def test_classes_are_matched_by_name():
    order = [2, 0, 1]
    permuted = build_backbone(7)
    with torch.no_grad():
        permuted.model.fc.weight.mul_(4)
        permuted.model.fc.weight.copy_(permuted.model.fc.weight[order].clone())
        permuted.model.fc.bias.copy_(permuted.model.fc.bias[order].clone())
    other = FrozenTeacher(permuted.model, [CLASSES[i] for i in order], VIEW, "permuted")
    for options in ({}, {"distance": "kl"}, {"distance": "ldi", "top_k": 2}, {"filter": "likelihood"}):
        expected, _ = pull(ready(**options), batch_of(13))
        got, _ = pull(ready(reference=other, **options), batch_of(13))
        assert torch.allclose(got, expected, rtol=1e-12, atol=1e-16)


def test_a_class_that_the_old_model_does_not_know_is_learned_from_labels_alone():
    batch, old = batch_of(13), teach(classes=FOREIGN)
    pulled, new = pull(ready(reference=old), batch)
    outputs = old(batch.input)
    known = batch.target != 1
    right = torch.tensor([FOREIGN[k] == CLASSES[y] for k, y in zip(outputs.argmax(-1), batch.target, strict=True)])
    assert not right[outputs.argmax(-1) == 1].any()  # a dodo is no answer, though the shared outputs alone have one
    assert 0 < right.sum() < known.sum()
    expected = torch.zeros_like(new)
    expected[:, 0], expected[:, 2] = new[:, 0] - outputs[:, 2], new[:, 2] - outputs[:, 0]
    expected *= (known * (1 + 5 * right)).double().unsqueeze(1) / 13
    assert torch.allclose(pulled, expected, rtol=1e-9, atol=1e-15)
    assert torch.equal(pulled[~known], torch.zeros_like(pulled[~known]))


def test_the_label_can_be_left_out_where_class_sets_differ():
    batch = batch_of(12)
    pulled, new = pull(ready(reference=teach(classes=FOREIGN), distance="ldi", exclude_target=True, beta=0.0), batch)
    gap = new[:, [0, 2]] - teach(classes=FOREIGN)(batch.input)[:, [2, 0]]
    expected = torch.zeros_like(new)
    expected[batch.target == 0, 2] = 2 * gap[batch.target == 0, 1] / 12
    expected[batch.target == 2, 0] = 2 * gap[batch.target == 2, 0] / 12
    assert torch.allclose(pulled, expected, rtol=1e-9, atol=1e-15)


def test_the_old_model_sees_the_same_images_in_its_own_normalization():
    view = View(6, 1.0, (0.4, 0.5, 0.6), (0.2, 0.25, 0.3))
    batch, old = batch_of(9), teach(view=view)
    pulled, new = pull(ready(reference=old, alpha=1.0, beta=0.0), batch)
    pixels = 0.5 + 0.5 * batch.input
    mean, std = (torch.tensor(values, dtype=torch.float64).view(3, 1, 1) for values in (view.mean, view.std))
    outputs = old.model((pixels - mean) / std)
    assert torch.allclose(pulled, 2 * (new - outputs) / 3 / 9, rtol=1e-9, atol=1e-14)


def test_an_ensemble_of_one_is_the_model_and_order_does_not_matter():
    batch = batch_of(9)
    alone, _ = pull(ready(reference=teach(7)), batch)
    single, _ = pull(ready(reference=EnsembleTeacher([teach(7)])), batch)
    assert torch.equal(alone, single)
    both, new = pull(ready(reference=EnsembleTeacher([teach(7), teach(8)]), beta=0.0), batch)
    turned, _ = pull(ready(reference=EnsembleTeacher([teach(8), teach(7)]), beta=0.0), batch)
    assert torch.equal(both, turned)
    outputs = (teach(7)(batch.input) + teach(8)(batch.input)) / 2
    assert torch.allclose(both, 2 * (new - outputs) / 3 / 9, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("classes", [CLASSES, FOREIGN])
def test_the_old_head_judges_the_new_features(classes):
    images, target = draw(13)
    old = teach(classes=classes)
    position = torch.tensor([classes.index(c) if c in classes else -1 for c in CLASSES])[target]

    def objective(model):
        features = nn.Sequential(*list(model)[:-1])(images)
        outputs = linear(features, old.model.fc.weight, old.model.fc.bias)
        judged = cross_entropy(outputs, position.clamp(min=0), reduction="none") * (position >= 0)
        return cross_entropy(model(images), target) + 0.7 * judged.mean()

    method = build(reference=old, influence=0.7, strength=0.0)
    model, before = method.model.eval(), snapshot(method)
    steps = gradient(objective, model)
    passes = []
    model.register_forward_hook(lambda *_: passes.append(1))
    fit(method, images, target)
    assert len(passes) == 1
    assert not model.fc._forward_pre_hooks
    for key, step in steps.items():
        expected = before[f"model.{key}"] - 0.1 * step
        assert torch.allclose(model.get_parameter(key), expected, rtol=1e-10, atol=1e-13), key


def test_training_leaves_the_old_model_as_it_is_and_checkpoints_do_not_hold_it(tmp_path):
    old = teach()
    before = {name: value.clone() for name, value in old.state_dict().items()}
    assert any("running_var" in name for name in before)
    method = build(reference=old, batch_norm="train", influence=0.1, optimizer=partial(torch.optim.AdamW, lr=0.01))
    trainer = build_trainer(2)
    fit_on(trainer, method, TensorData(*draw(13), batch_size=6))
    after = old.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    assert not any(module.training for module in old.modules())
    assert all(parameter.grad is None for parameter in old.parameters())

    plain = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    assert method.state_dict().keys() == plain.state_dict().keys()
    trained = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert trained == {id(p) for p in method.model.parameters()}
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    stored = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert stored["state_dict"].keys() == plain.state_dict().keys()
    assert stored["hyper_parameters"]["beta"] == 5.0
    assert "reference" not in stored["hyper_parameters"]
    assert "reference" not in method.hparams_initial


def test_what_is_logged_is_the_mean_over_samples():
    method = build(reference=teach(classes=FOREIGN), optimizer=partial(torch.optim.SGD, lr=0.0))
    trainer, (images, target) = build_trainer(1), draw(11)
    fit_on(trainer, method, TensorData(images, target, batch_size=4))
    got = {name: value.item() for name, value in trainer.callback_metrics.items()}
    new, old = method.model.eval()(images), teach(classes=FOREIGN)(images)
    known, right = target != 1, old.argmax(-1) == torch.tensor([2, -1, 0])[target]
    labels = cross_entropy(new, target).item()
    distances = squared(new[:, [0, 2]], old[:, [2, 0]]) * known * (1 + 5 * right)
    assert got["train/cross_entropy"] == pytest.approx(labels, rel=1e-6)
    assert got["train/distillation"] == pytest.approx(distances.mean().item(), rel=1e-6)
    assert got["train/loss"] == pytest.approx(labels + distances.mean().item(), rel=1e-6)
    assert got["train/reference_acc"] == pytest.approx(right[known].double().mean().item(), rel=1e-6)


def test_evaluation_needs_no_reference_and_is_that_of_finetuning():
    data = TensorData(*draw(9), batch_size=4)
    plain = Finetune(build_backbone(), CLASSES, optimizer=SGD)
    method = build(reference=None)
    for check in ("validate", "test"):
        trainers = [build_trainer(0, limit_val_batches=1.0) for _ in range(2)]
        got, expected = (
            getattr(trainer, check)(each, datamodule=data, verbose=False)[0]
            for trainer, each in zip(trainers, (method, plain), strict=True)
        )
        assert got == expected


def test_the_old_model_follows_to_the_device():
    method = build()
    method.to("meta")
    method.on_fit_start()
    assert {p.device.type for p in method.old_model.parameters()} == {"meta"}


def test_it_trains_under_autocast_with_the_old_model_in_full_precision():
    def narrow(seed):
        backbone = build_backbone(seed, dtype=torch.float32)
        return backbone, FrozenTeacher(backbone.model, CLASSES, VIEW, f"old{seed}", backbone)

    images, target = draw(12, dtype=torch.float32)
    losses = {}
    for precision in ("32-true", "bf16-mixed"):
        method = FocalDistillation(narrow(0)[0], CLASSES, optimizer=SGD, reference=narrow(7)[1], influence=0.1)
        method.model.drop.p = 0.0
        trainer = build_trainer(1, precision=precision)
        fit_on(trainer, method, TensorData(images, target))
        losses[precision] = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert losses["bf16-mixed"] == pytest.approx(losses["32-true"], rel=0.05)
    assert losses["bf16-mixed"]["train/reference_acc"] == losses["32-true"]["train/reference_acc"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"distance": "l2"}, r"logits, kl, ldi, none, got 'l2'.*method\.distance=logits"),
        ({"filter": "neg_flip"}, r"got 'neg_flip'.*method\.filter=focal"),
        ({"class_reduction": "max"}, r"got 'max'.*method\.class_reduction=mean"),
        ({"mixing": "both"}, r"got 'both'.*method\.mixing=paper"),
        ({"alpha": -1.0}, r"got -1\.0.*method\.alpha=1"),
        ({"beta": float("nan")}, r"got nan.*method\.beta=5"),
        ({"strength": -1.0}, r"got -1\.0.*method\.strength=1"),
        ({"margin": -0.5}, r"got -0\.5.*method\.margin=0"),
        ({"power": 0.5}, r"got 0\.5.*method\.power=2"),
        ({"influence": -1.0}, r"got -1\.0.*method\.influence=0"),
        ({"temperature": 0.0}, r"got 0\.0.*method\.temperature=100"),
        ({"distillation_share": 1.5}, r"got 1\.5.*method\.distillation_share=0\.9"),
        ({"alpha": 0.0, "beta": 0.0}, r"nothing would be distilled.*method\.beta=5"),
        ({"top_k": 0}, r"got 0.*method\.top_k=null"),
    ],
)
def test_wrong_options_name_the_override(options, message):
    with pytest.raises(ValueError, match=message):
        build(**options)


def stored():
    import pandas as pd

    return StoredPredictions(pd.DataFrame({"index": [0, 1], "prediction": ["ant", "bee"]}), CLASSES, "old.parquet")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (lambda: {"reference": None}, r"got no `reference`\. Set reference=RUN/checkpoints/best\.ckpt"),
        (lambda: {"reference": stored()}, r"old\.parquet.*augmented images.*best\.ckpt; or method=lqf"),
        (lambda: {"reference": teach(classes=["x", "y", "z"])}, r"share no name"),
        (lambda: {"distance": "ldi", "top_k": 4}, r"top_k=4.*the models share 3.*method\.top_k=null"),
        (
            lambda: {"distance": "ldi", "top_k": 2, "exclude_target": True, "reference": teach(classes=FOREIGN)},
            r"exclude_target=True.*share 2",
        ),
        (
            lambda: {"influence": 1.0, "reference": EnsembleTeacher([teach(7), teach(8)])},
            r"not one plain network.*method\.influence=0",
        ),
        (
            lambda: {"influence": 1.0, "reference": FrozenTeacher(teach().model, CLASSES, VIEW, "linear")},
            r"linear is not one plain network.*method=finetune",
        ),
        (lambda: {"influence": 1.0, "reference": widened()}, r"old head 5 features, but tiny has 3.*backbone\.name"),
    ],
)
def test_wrong_references_are_refused_before_the_first_batch(options, message):
    method = build(**options())
    method.training_step = lambda *_: pytest.fail("a batch was trained on")
    with pytest.raises(ValueError, match=message):
        fit(method, *draw(6))


def widened():
    backbone = build_backbone(7)
    backbone.model.fc = nn.Linear(5, 3).double()
    return FrozenTeacher(backbone.model, CLASSES, VIEW, "wide", backbone)


def step_on_rank(shards, options):
    """Gradients averaged over ranks as DDP does, and the metrics of the step."""
    import torch.distributed as dist

    method, whole = ready(**options), batch_of(12)
    rows = shards[dist.get_rank()]
    part = Batch(*(value[rows] for value in whole))
    loss = method.training_step(part, 0)["loss"]
    loss.backward()
    gradients = [p.grad for p in method.model.parameters()]
    for value in gradients:
        dist.all_reduce(value)
        value /= dist.get_world_size()
    means = (method.train_loss, method.train_cross_entropy, method.train_distillation, method.train_reference_acc)
    return gradients, [mean.compute().item() for mean in means]


EVEN = {1: [slice(0, 12)], 2: [slice(0, 6), slice(6, 12)], 3: [slice(0, 4), slice(4, 8), slice(8, 12)]}
UNEVEN = {2: [slice(0, 12), slice(0, 0)], 3: [slice(0, 7), slice(7, 7), slice(7, 12)]}
ON_RANKS = {
    "default": {},
    "influence": {"influence": 0.5, "distance": "kl", "filter": "negative_flip"},
    "naive": {"distance": "none"},
}


@pytest.mark.parametrize("name", ON_RANKS)
def test_gradients_and_metrics_of_a_step_do_not_depend_on_the_number_of_ranks(name):
    options = {**ON_RANKS[name], "reference": teach(classes=FOREIGN)}
    ((expected, metrics),) = run_on_ranks(1, step_on_rank, EVEN[1], options)
    for world_size in (2, 3):
        for gradients, means in run_on_ranks(world_size, step_on_rank, EVEN[world_size], options):
            assert means == pytest.approx(metrics, rel=1e-6)
            for got, wanted in zip(gradients, expected, strict=True):
                assert torch.allclose(got, wanted, rtol=1e-9, atol=1e-14)
        for _, means in run_on_ranks(world_size, step_on_rank, UNEVEN[world_size], options):
            assert means == pytest.approx(metrics, rel=1e-6)


@pytest.fixture(scope="module")
def old_run(tmp_path_factory, folder_of_shapes):
    """A run whose best checkpoint is the model in use."""
    folder = tmp_path_factory.mktemp("old")
    run_tiny(folder, folder_of_shapes, "method=finetune", "callbacks=[]", "seed=3")
    return folder / "checkpoints" / "best.ckpt"


def upgrade(output, root, old, *overrides):
    return run_tiny(output, root, "method=focal_distillation", f"reference={old}", "callbacks=[]", *overrides)


def state(run):
    return torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)


def test_an_upgrade_runs_from_the_command_line_and_its_checkpoint_is_evaluated_without_the_old_model(
    old_run, tmp_path, folder_of_shapes
):
    metrics = upgrade(tmp_path, folder_of_shapes, old_run, "method.influence=0.1")
    assert metrics["train/distillation"] > 0
    assert 0 <= metrics["train/reference_acc"] <= 1
    keys = torch.load(old_run, weights_only=True)["state_dict"].keys()
    assert state(tmp_path)["state_dict"].keys() == keys
    config = compose(
        f"checkpoint={tmp_path}/checkpoints/best.ckpt", "progress=none", "callbacks=[]",
        f"paths.output_dir={tmp_path}/eval", name="eval",
    )  # fmt: skip
    assert evaluate(config)["test/loss"] == pytest.approx(metrics["test/loss"], rel=1e-6)


@pytest.mark.parametrize("method", ["distillation", "elodi"])
def test_presets_train(method, old_run, tmp_path, folder_of_shapes):
    reference = f"reference=[{old_run},{old_run.parent}/last.ckpt]"
    metrics = run_tiny(
        tmp_path, folder_of_shapes, f"method={method}", reference, "callbacks=[]", "trainer.max_epochs=1", "test=false"
    )
    share = {"distillation": (1, 1), "elodi": (0.2, 0.8)}[method]
    expected = share[0] * metrics["train/cross_entropy"] + share[1] * metrics["train/distillation"]
    assert metrics["train/loss"] == pytest.approx(expected, rel=1e-5)


def test_interrupted_and_resumed_training_ends_with_the_same_weights(old_run, tmp_path, folder_of_shapes):
    options = ("trainer.max_epochs=3", "data/augmentation=randaugment", "test=false")
    upgrade(tmp_path / "whole", folder_of_shapes, old_run, *options)
    crash = "+callbacks.crash={_target_: crash.CrashAtEpoch, epoch: 1}"
    with pytest.raises(RuntimeError, match="pulled the plug"):
        upgrade(tmp_path / "parts", folder_of_shapes, old_run, *options, crash)
    upgrade(tmp_path / "parts", folder_of_shapes, old_run, *options)
    whole, parts = state(tmp_path / "whole"), state(tmp_path / "parts")
    assert whole["global_step"] == parts["global_step"] == 6
    assert all(torch.equal(value, parts["state_dict"][name]) for name, value in whole["state_dict"].items())


OTHERWISE = {
    "alpha": 2.0, "beta": 3.0, "distance": "kl", "filter": "all", "temperature": 2.0, "class_reduction": "sum",
    "centered": True, "margin": 0.5, "power": 3.0, "top_k": 2, "exclude_target": True, "one_sided": True,
    "strength": 0.5, "mixing": "released", "distillation_share": 0.5, "influence": 0.1,
}  # fmt: skip


def resume(checkpoint, epochs, **options):
    trainer = build_trainer(epochs)
    start = {"ckpt_path": checkpoint, "weights_only": True} if checkpoint.exists() else {}
    fit_on(trainer, build(**options), TensorData(*draw(12), batch_size=6), **start)
    trainer.save_checkpoint(checkpoint)
    return trainer


@pytest.mark.parametrize("name", ["reference", *OTHERWISE])
def test_a_checkpoint_of_another_objective_is_not_gone_on_from(name, tmp_path):
    resume(tmp_path / "run.ckpt", 1)
    changed = {"reference": teach(8)} if name == "reference" else {name: OTHERWISE[name]}
    was = teach().fingerprint if name == "reference" else build().hparams[name]
    with pytest.raises(ValueError, match=rf"{name}\w* was {was} and is .* now\. Set hydra.run.dir to another folder"):
        resume(tmp_path / "run.ckpt", 2, **changed)
    data = TensorData(*draw(9))
    build_trainer(0, limit_test_batches=1.0).test(
        build(**{"reference": None, **changed}), data, tmp_path / "run.ckpt", verbose=False, weights_only=True
    )
    assert resume(tmp_path / "run.ckpt", 2).global_step == 4


def test_a_checkpoint_that_does_not_tell_its_reference_is_gone_on_from(tmp_path):
    resume(tmp_path / "run.ckpt", 1)
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    del stored["hyper_parameters"]["reference_fingerprint"]
    torch.save(stored, tmp_path / "run.ckpt")
    assert resume(tmp_path / "run.ckpt", 2, reference=teach(8)).global_step == 4


def test_a_run_resumed_with_another_strength_is_refused(old_run, tmp_path, folder_of_shapes):
    options = ("test=false", "trainer.max_epochs=1")
    upgrade(tmp_path, folder_of_shapes, old_run, *options)
    with pytest.raises(ValueError, match=r"beta was 5\.0 and is 2.* now\. Set .*ckpt_path=null to start over"):
        upgrade(tmp_path, folder_of_shapes, old_run, "method.beta=2", "test=false")
    upgrade(tmp_path, folder_of_shapes, old_run, "method.beta=2", "ckpt_path=null", *options)


def test_the_accuracy_of_the_old_model_does_not_take_the_precision_of_the_run(monkeypatch):
    batch, seen = batch_of(7), []
    method = ready()
    monkeypatch.setattr(method.train_reference_acc, "update", lambda value, size: seen.append((value, size)))
    torch.set_default_dtype(torch.bfloat16)  # as a step of precision=bf16-true has it
    try:
        method.training_loss(method(batch.input), batch)
    finally:
        torch.set_default_dtype(torch.float32)
    ((value, size),) = seen
    assert size == 7
    right = int((teach()(batch.input).argmax(-1) == batch.target).sum())
    assert 0 < right < 7  # a binary fraction is no such number of sevenths
    assert value.item() == right / 7


def test_classes_that_the_old_model_lacks_are_told_once(caplog):
    ready(reference=teach(classes=FOREIGN))
    assert caplog.text.count("old7: the old model does not know [bee]; it knows [dodo], which the data lack") == 1
    caplog.clear()
    ready()
    assert caplog.text == ""


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_an_upgrade_on_a_gpu_learns_from_the_old_model(precision, old_run, tmp_path, folder_of_shapes):
    options = ("trainer=gpu", f"trainer.precision={precision}", "method.influence=0.1", "method.distance=kl")
    metrics = upgrade(tmp_path, folder_of_shapes, old_run, *options)
    on_cpu = upgrade(tmp_path / "cpu", folder_of_shapes, old_run, *options[2:])
    names = ("train/cross_entropy", "train/distillation", "train/loss")
    assert [metrics[name] for name in names] == pytest.approx([on_cpu[name] for name in names], rel=0.05)


@pytest.fixture(scope="module")
def runs_on_ranks(old_run, tmp_path_factory, folder_of_shapes):
    root = tmp_path_factory.mktemp("ranks")
    for size in (1, 2, 3):
        ranks = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={size}", "trainer.strategy=ddp_fork"]
        upgrade(root / str(size), folder_of_shapes, old_run, "method.batch_norm=frozen", *(ranks if size > 1 else []))
    return root


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_run_does_not_depend_on_the_number_of_ranks(runs_on_ranks, world_size):
    single, many = (state(runs_on_ranks / str(size))["state_dict"] for size in (1, world_size))
    for name, value in single.items():
        scale = value.double().abs().max().clamp(min=1e-3)
        assert (value.double() - many[name].double()).abs().max() <= 1e-5 * scale, name
    single, many = (
        json.loads((runs_on_ranks / str(size) / "metrics.json").read_text()) for size in (1, world_size)
    )  # fmt: skip
    assert single.keys() == many.keys()
    assert {"train/distillation", "train/cross_entropy", "train/reference_acc"} <= single.keys()
    for name, value in single.items():
        if not name.startswith("time/"):
            assert many[name] == pytest.approx(value, rel=1e-5, abs=1e-6), name
