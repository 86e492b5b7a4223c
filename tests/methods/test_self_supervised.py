import copy
from functools import partial

import pytest
import torch
from torch.nn import functional as F

from lqf_lightning.methods import BYOL, MoCo
from lqf_lightning.methods.self_supervised import SelfSupervised
from methods.paired import PairData, build, views
from methods.tensors import SGD, build_backbone, build_trainer, draw, fit_on, snapshot
from tiny import run_tiny

FEW = torch.tensor([0, -1, -1, 1, -1, -1, -1, -1, 2, -1, -1, -1])  # the second batch of six has one label
KINDS = {
    "moco": lambda **options: build(MoCo, **{"queue_size": 12, "hidden_width": 16, "projection_width": 4, **options}),
    "byol": lambda **options: build(BYOL, **{"hidden_width": 8, "projection_width": 4, **options}),
}


@pytest.fixture(params=KINDS)
def make(request):
    return KINDS[request.param]


def train(method, target=None, epochs=1, batch_size=6, trainer=None, **options):
    images, labels = draw(12)
    trainer = trainer or build_trainer(epochs)
    fit_on(trainer, method, PairData(images, labels if target is None else target, batch_size, **options))
    return trainer


def test_the_linear_classifiers_watch_and_do_not_interfere(make):
    watched, alone = make(momentum=0.5), make(momentum=0.5, online_lr=0.0)
    alone.load_state_dict(watched.state_dict())
    before = snapshot(alone)
    for method in (watched, alone):
        train(method, epochs=2)
    for name, value in alone.state_dict().items():
        if name.startswith("online"):
            assert torch.equal(value, before[name])
            assert not torch.equal(value, watched.state_dict()[name])
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, watched.state_dict()[name]), name


@pytest.mark.parametrize("target", [None, FEW])
def test_each_classifier_takes_a_step_on_the_directions_of_its_own_features(make, target):
    method = make(online_lr=0.7, momentum=1.0)
    twin = copy.deepcopy(method)
    images, labels = draw(12)
    labels = labels if target is None else target
    train(method, target, batch_size=12)
    _, student, teacher = twin.pretext(*views(images), labels)
    known = labels >= 0
    for name, features in (("student", student), ("teacher", teacher)):
        linear = twin.online[name]
        directions = features[known].detach() / features[known].detach().norm(dim=1, keepdim=True)
        F.cross_entropy(linear(directions), labels[known]).backward()
        for key in ("weight", "bias"):
            expected = getattr(linear, key) - 0.7 * getattr(linear, key).grad
            assert torch.allclose(getattr(method.online[name], key), expected, rtol=1e-10, atol=1e-13), name


def test_hidden_labels_neither_teach_nor_count(make):
    one, other = make(momentum=0.5), make(momentum=0.5)
    other.load_state_dict(one.state_dict())
    metrics = [dict(train(m, FEW).callback_metrics) for m in (one, other)]
    assert metrics[0] == metrics[1]
    assert metrics[0]["train/acc"].item() * 3 == pytest.approx(round(metrics[0]["train/acc"].item() * 3))
    nothing = torch.full((12,), -1)
    blind = make(momentum=0.5)
    before = snapshot(blind.online)
    trained = train(blind, nothing)
    assert all(torch.equal(value, before[name]) for name, value in blind.online.state_dict().items())
    assert trained.callback_metrics["train/loss"].isfinite()
    assert trained.callback_metrics["train/acc"].isnan()  # there is nothing to be right about


def test_both_classifiers_are_evaluated(make):
    method = make(momentum=0.5)
    images, target = draw(10, seed=4)
    trainer = build_trainer(2, limit_val_batches=1.0)
    train(method, trainer=trainer, val=(images, target), batch_size=4)
    method.eval()
    for part, prefix in ((method.student, "val/"), (method.teacher.model, "val/teacher_")):
        features = part(images).features
        linear = method.online["teacher" if "teacher" in prefix else "student"]
        logits = linear(features / features.norm(dim=1, keepdim=True))
        accuracy = (logits.argmax(1) == target).double().mean().item()
        assert trainer.callback_metrics[f"{prefix}acc"].item() == pytest.approx(accuracy, rel=1e-6)
        loss = F.cross_entropy(logits, target).item()
        assert trainer.callback_metrics[f"{prefix}loss"].item() == pytest.approx(loss, rel=1e-6)


def test_the_head_never_changes_and_takes_no_gradient(make):
    method = make()
    before = snapshot(method)
    trainer = train(method, epochs=2)
    for part in ("student.model.fc.", "teacher.model.model.fc."):
        for key in ("weight", "bias"):
            assert torch.equal(method.state_dict()[part + key], before[part + key])
    head = method.backbone.model.fc
    assert head.weight.grad is None
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in head.parameters()}
    assert optimized == {id(p) for p in method.parameters() if p.requires_grad}


def test_layers_that_do_not_train_are_frozen_with_their_statistics(make):
    method = make(layers=["stage1"])
    before = snapshot(method)
    train(method)
    moved = {
        name for name, value in method.student.state_dict().items() if not torch.equal(before[f"student.{name}"], value)
    }
    assert {name for name in moved if name.startswith("model.")} == {
        "model.conv2.weight", "model.bn2.weight", "model.bn2.bias", "model.bn2.running_mean", "model.bn2.running_var",
        "model.bn2.num_batches_tracked",
    }  # fmt: skip


def groups(method):
    names = {id(p): name for name, p in method.named_parameters()}
    return {
        group["name"]: ({names[id(p)] for p in group["params"]}, group["lr"], group["weight_decay"])
        for group in method.configure_optimizers().param_groups
    }


DECAY = partial(torch.optim.SGD, lr=0.1, weight_decay=0.01)


def test_what_has_one_dimension_is_set_apart_where_it_does_not_decay():
    method = KINDS["byol"](optimizer=DECAY, decay_all=False, group_lr={"projector": 2, "stem": 3, "predictor": 0.5})
    assert groups(method) == {
        "stem": ({"student.model.conv1.weight"}, pytest.approx(0.3), 0.01),
        "stem_no_decay": ({"student.model.bn1.weight", "student.model.bn1.bias"}, pytest.approx(0.3), 0),
        "stage1": ({"student.model.conv2.weight"}, 0.1, 0.01),
        "stage1_no_decay": ({"student.model.bn2.weight", "student.model.bn2.bias"}, 0.1, 0),
        "projector": ({"student.projector.0.weight", "student.projector.3.weight"}, 0.2, 0.01),
        "projector_no_decay": ({"student.projector.1.weight", "student.projector.1.bias"}, 0.2, 0),
        "predictor": ({"predictor.0.weight", "predictor.3.weight"}, 0.05, 0.01),
        "predictor_no_decay": ({"predictor.1.weight", "predictor.1.bias"}, 0.05, 0),
        "online": ({f"online.{n}.{p}" for n in ("student", "teacher") for p in ("weight", "bias")}, 1.0, 0),
    }


def test_everything_decays_where_that_is_asked_for():
    found = groups(KINDS["moco"](optimizer=DECAY, decay_all=True, layers=["stage1"], group_lr={"projector": 2}))
    assert {name: values[1:] for name, values in found.items()} == {
        "stage1": (0.1, 0.01), "projector": (0.2, 0.01), "online": (1.0, 0),
    }  # fmt: skip
    assert {"student.model.bn2.bias", "student.model.conv2.weight"} < found["stage1"][0]
    assert {"student.projector.0.bias"} < found["projector"][0]


def test_the_head_is_no_layer_that_trains(make):
    with pytest.raises(ValueError, match=r"not the head.*method\.layers to some of \['stem', 'stage1'\]"):
        make(layers=["stage1", "head"])
    with pytest.raises(ValueError, match=r"got \['neck'\].*method\.layers"):
        make(layers=["neck"])
    with pytest.raises(ValueError, match=r"got \['neck'\].*method\.group_lr"):
        make(group_lr={"neck": 2})


def test_a_factor_for_a_part_that_is_not_there_is_refused():
    with pytest.raises(ValueError, match=r"predictor.*method\.group_lr"):
        KINDS["moco"](group_lr={"predictor": 2})


def test_a_single_image_per_process_is_refused_before_the_first_batch(make):
    method = make()
    method.training_step = lambda *_: pytest.fail("a batch was trained on")
    with pytest.raises(ValueError, match=r"data\.batch_size=1 gives 1 processes.*Set data\.batch_size=256"):
        train(method, batch_size=1)


def test_a_method_has_to_say_what_it_compares():
    method = SelfSupervised.pretext
    with pytest.raises(NotImplementedError, match="must define `pretext`"):
        method(KINDS["moco"](), None, None, None)


PRECISION = {
    "moco": ["method=moco", "method.queue_size=24"],
    "byol": ["method=byol", "method.hidden_width=16", "method.projection_width=8", "method.optimizer.lr=0.1"],
}


@pytest.mark.parametrize("name", PRECISION)
def test_half_precision_changes_little(name, tmp_path, folder_of_shapes):
    metrics = {
        precision: run_tiny(
            tmp_path / precision, folder_of_shapes, *PRECISION[name], f"trainer.precision={precision}", "callbacks=[]",
            "test=false", "trainer.max_epochs=1",
        )
        for precision in ("32-true", "bf16-mixed", "bf16-true")
    }  # fmt: skip
    for precision in ("bf16-mixed", "bf16-true"):
        for key in ("train/loss", "val/loss", "val/teacher_loss"):
            assert metrics[precision][key] == pytest.approx(metrics["32-true"][key], rel=0.05), (precision, key)
    stored = torch.load(tmp_path / "bf16-true" / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert {v.dtype for k, v in stored.items() if k.startswith("teacher.model.") and v.is_floating_point()} == {
        torch.float32
    }
    assert stored["student.projector.0.weight"].dtype == torch.bfloat16


def test_the_network_is_the_students():
    backbone = build_backbone()
    method = MoCo(backbone, ["a", "b", "c"], optimizer=SGD, views=lambda **_: views, queue_size=12)
    assert method.model is backbone.model is method.student.model
    assert method.networks()["student"].model is backbone.model
    assert method.networks()["teacher"].model is method.teacher.model.model
    assert not method.head_is_trained


def test_a_rate_for_the_head_would_have_no_effect():
    with pytest.raises(ValueError, match=r"`group_lr` names it\. Set method\.group_lr"):
        build(MoCo, queue_size=12, group_lr={"head": 10})
