import copy

import pytest
import torch
from torch.nn.functional import normalize

from lqf_lightning.methods import MoCo, SupMoCo
from methods.paired import PairData, build, views
from methods.tensors import build_trainer, draw, fit_on

LABELS = torch.tensor([0, 1, 2, -1, 1, 0, 0, -1, 2, 1, 0, 2])


def make(kind=SupMoCo, **options):
    return build(kind, **{"queue_size": 12, "hidden_width": 16, "projection_width": 4, "momentum": 0.5, **options})


def train(method, target, epochs=1):
    trainer = build_trainer(epochs)
    fit_on(trainer, method, PairData(draw(len(target))[0], target, 6))
    return trainer


@pytest.mark.parametrize("same_class", ["positive", "ignored"])
def test_without_labels_it_is_moco_step_for_step(same_class):
    method, plain = make(same_class=same_class), make(MoCo)
    plain.load_state_dict(method.state_dict())
    metrics = [train(each, torch.full((12,), -1), 3).callback_metrics["train/loss"] for each in (method, plain)]
    assert torch.equal(*metrics)
    for name, value in plain.state_dict().items():
        assert torch.equal(method.state_dict()[name], value), name


@pytest.mark.parametrize("same_class", ["positive", "ignored"])
def test_labels_matter_as_soon_as_the_queue_knows_some(same_class):
    states = []
    for number in (6, 12):
        method, plain = make(same_class=same_class), make(MoCo)
        plain.load_state_dict(method.state_dict())
        for each in (method, plain):
            train(each, LABELS[:number])
        states.append([each.state_dict()["student.model.conv1.weight"] for each in (method, plain)])
    assert torch.equal(*states[0])
    assert not torch.allclose(*states[1], rtol=1e-6)


def contrast(method, images, labels, temperature, same_class):
    """By the definition, sample by sample."""
    first, second = views(images)
    query, keys = normalize(method.student(first).projection), normalize(method.teacher(second).projection)
    queue, known = method.queue.keys, method.queue.labels
    total = query.new_zeros(())
    for q, k, label in zip(query, keys, labels.tolist(), strict=True):
        same = [label >= 0 and label == other for other in known.tolist()]
        own, others = torch.exp(q @ k / temperature), torch.exp(queue @ q / temperature)
        if same_class == "ignored":
            total -= torch.log(own / (own + sum(o for o, s in zip(others, same, strict=True) if not s)))
        else:
            positives = [own, *(o for o, s in zip(others, same, strict=True) if s)]
            total -= sum(torch.log(p / (own + others.sum())) for p in positives) / len(positives)
    return total / len(images)


@pytest.mark.parametrize("same_class", ["positive", "ignored"])
def test_a_step_follows_the_definition(same_class):
    method = make(same_class=same_class, temperature=0.3)
    method.queue.labels.copy_(torch.tensor([0, 0, 1, -1, -1, 2, 1, 1, 0, 2, -1, 2]))
    method.queue.filled = 12
    images, target = draw(6)[0], LABELS[:6]
    twin = copy.deepcopy(method)
    trainer = train(method, target)
    loss = contrast(twin, images, target, 0.3, same_class)
    assert trainer.callback_metrics["train/loss"].item() == pytest.approx(loss.item(), rel=1e-6)
    loss.backward()
    for name, parameter in twin.student.named_parameters():
        if parameter.requires_grad:
            expected = parameter - 0.1 * parameter.grad
            assert torch.allclose(method.student.get_parameter(name), expected, rtol=1e-10, atol=1e-13), name


def test_another_name_is_refused():
    with pytest.raises(ValueError, match=r"positive, ignored, got 'negative'\. Set method\.same_class=positive"):
        make(same_class="negative")


def test_options_are_kept_in_checkpoints():
    hparams = make(same_class="ignored", queue_size=24).hparams
    assert (hparams["same_class"], hparams["queue_size"], hparams["classes"]) == ("ignored", 24, ["ant", "bee", "cat"])
    assert not {"backbone", "views", "optimizer", "projector"} & hparams.keys()
