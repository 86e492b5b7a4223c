import copy

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize
from torch.nn.modules.batchnorm import _BatchNorm

from lqf_lightning.methods import MoCo
from methods.paired import PairData, buffers, build, views
from methods.tensors import build_trainer, draw, fit_on, snapshot
from tiny import run_tiny


def make(**options):
    return build(MoCo, **{"queue_size": 12, "hidden_width": 16, "projection_width": 4, "momentum": 0.5, **options})


def train(method, number=12, batch_size=6, epochs=1, *callbacks, **options):
    trainer = build_trainer(epochs, *callbacks, **options)
    fit_on(trainer, method, PairData(*draw(number), batch_size))
    return trainer


def contrast(method, images, temperature):
    """By the definition: the own key is at position 0, those of the queue behind it."""
    first, second = views(images)
    query = normalize(method.student(first).projection)
    key = normalize(method.teacher(second).projection)
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ method.queue.keys.T], 1) / temperature
    return cross_entropy(logits, torch.zeros(len(images), dtype=torch.int64))


@pytest.mark.parametrize("teacher", ["eman", "ema", "ema_copied"])
def test_a_step_tells_the_own_key_from_those_of_the_queue(teacher):
    method = make(temperature=0.3, teacher=teacher)
    method.queue.filled = 12  # as if the noise had been put in
    twin, images = copy.deepcopy(method), draw(6)[0]
    trainer = train(method, 6)
    loss = contrast(twin, images, 0.3)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    trained = [(name, p) for name, p in twin.student.named_parameters() if p.requires_grad]
    assert len(trained) == 10
    for name, parameter in trained:
        expected = parameter - 0.1 * parameter.grad
        assert torch.allclose(method.student.get_parameter(name), expected, rtol=1e-10, atol=1e-13), name
        assert parameter.grad.norm() > 1e-6


def test_the_noise_that_a_queue_begins_with_is_no_negative():
    method = make(temperature=0.3, momentum=1.0)
    before, images = copy.deepcopy(method), torch.cat([draw(6)[0], 1 - draw(6)[0]])
    first = train(method, 6)  # nothing to be told from: no loss, and nothing learned
    assert first.callback_metrics["train/loss"] == 0
    for name, parameter in before.student.named_parameters():
        assert torch.equal(method.student.get_parameter(name), parameter), name
    second, _, _ = method.pretext(*views(images[6:]), torch.full((6,), -1))
    query = normalize(before.student(views(images[6:])[0]).projection)
    key, others = (normalize(before.teacher(views(part)[1]).projection) for part in (images[6:], images[:6]))
    logits = torch.cat([(query * key).sum(1, keepdim=True), query @ others.T], 1) / 0.3  # six keys, not twelve
    assert second.item() == pytest.approx(cross_entropy(logits, torch.zeros(6, dtype=torch.int64)).item(), rel=1e-6)


@pytest.mark.parametrize(("number", "position"), [(12, 0), (18, 6), (6, 6)])
def test_the_queue_holds_the_last_keys_in_the_order_in_which_they_came(number, position):
    method = make(momentum=1.0)  # a teacher that stays as it is
    noise = method.queue.keys.clone()
    images, target = draw(number)
    keys = normalize(method.teacher(views(images)[1]).projection)
    train(method, number)
    expected, labels = noise, torch.full((12,), -1)
    for row in range(number):
        expected[row % 12], labels[row % 12] = keys[row], target[row]
    assert torch.allclose(method.queue.keys, expected, rtol=1e-12)
    assert torch.equal(method.queue.labels, labels)
    assert method.queue.position == position


def test_the_network_trains_and_the_average_follows_with_its_projector():
    method = make()
    before = snapshot(method)
    train(method, epochs=2)
    state = method.state_dict()
    for name in ("model.conv1.weight", "model.bn2.running_var", "projector.0.weight", "projector.2.bias"):
        assert not torch.equal(state[f"student.{name}"], before[f"student.{name}"]), name
        assert not torch.equal(state[f"teacher.model.{name}"], before[f"teacher.model.{name}"]), name
        assert not torch.equal(state[f"teacher.model.{name}"], state[f"student.{name}"]), name


class Modes:
    """How the batch norms of the teacher stand, in training and in validation."""

    def __init__(self, method):
        self.found = {"train": set(), "val": set()}
        for stage, step in (("train", "training_step"), ("val", "validation_step")):
            setattr(method, step, self._watched(method, stage, getattr(method, step)))

    def _watched(self, method, stage, step):
        def watched(batch, batch_idx):
            self.found[stage] |= {m.training for m in method.teacher.modules() if isinstance(m, _BatchNorm)}
            before = buffers(method.teacher)
            result = step(batch, batch_idx)
            moved = any(not torch.equal(value, before[name]) for name, value in buffers(method.teacher).items())
            self.found[stage].add("moved" if moved else "kept")
            return result

        return watched


@pytest.mark.parametrize("teacher", ["eman", "ema", "ema_copied"])
def test_batch_statistics_are_used_by_the_plain_average_alone_and_never_in_validation(teacher):
    method = make(teacher=teacher)
    modes = Modes(method)
    train(method, epochs=2, limit_val_batches=1.0)
    assert modes.found["train"] == ({True, "moved"} if teacher == "ema" else {False, "kept"})
    assert modes.found["val"] == {False, "kept"}


def test_statistics_of_the_plain_average_are_those_of_its_own_batches():
    method = make(teacher="ema")
    norm = method.teacher.model.model.bn1
    images, before = draw(6)[0], norm.running_mean.clone()
    seen = method.teacher.model.model.conv1(views(images)[1]).transpose(0, 1).flatten(1).mean(1)
    train(method, 6)
    assert torch.allclose(norm.running_mean, 0.9 * before + 0.1 * seen, rtol=1e-12)


def test_copied_statistics_are_the_students():
    method = make(teacher="ema_copied")
    train(method, epochs=2)
    student = buffers(method.student)
    assert student.keys() == buffers(method.teacher.model).keys()
    assert all(torch.equal(value, student[name]) for name, value in buffers(method.teacher.model).items())


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_the_temperature_is_positive(temperature):
    with pytest.raises(ValueError, match=rf"got {temperature}\. Set method\.temperature=0\.2"):
        make(temperature=temperature)


def test_a_queue_that_batches_do_not_fill_is_refused_before_training():
    method = make(queue_size=10)
    method.training_step = lambda *_: pytest.fail("a batch was trained on")
    with pytest.raises(ValueError, match=r"10 keys is not a multiple of the 6 samples.*method\.queue_size=6 or 12"):
        train(method)


def run(folder, root, *overrides):
    return run_tiny(
        folder, root, "method=moco", "callbacks=[]", "test=false", "trainer.max_epochs=1", *overrides,
    )  # fmt: skip


def test_a_queue_longer_than_an_epoch_is_told(tmp_path, folder_of_shapes, caplog):
    run(tmp_path / "fits", folder_of_shapes, "method.queue_size=24")
    assert "longer than an epoch" not in caplog.text
    run(tmp_path / "long", folder_of_shapes, "method.queue_size=60", "data.labels_per_class=2")
    assert "a queue of 60 keys is longer than an epoch of 24 images" in caplog.text
    assert "Set method.queue_size=24 or less" in caplog.text


def test_a_network_without_batch_norm_is_trained_too(tmp_path, folder_of_shapes):
    metrics = run(tmp_path, folder_of_shapes, "backbone.name=test_vit", "method.queue_size=12", "method.momentum=0.5")
    state = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)["state_dict"]
    assert not any("running_mean" in name for name in state)
    assert not torch.equal(
        state["student.model.patch_embed.proj.weight"], state["teacher.model.model.patch_embed.proj.weight"]
    )
    assert 0 < metrics["train/loss"] < 10
