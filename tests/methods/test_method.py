import math
from functools import partial

import pytest
import torch
from torch.nn.functional import cross_entropy

from lqf_lightning.data import Batch
from lqf_lightning.methods import Finetune, Method
from lqf_lightning.methods.schedule import cosine
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on


def build(**options):
    return Finetune(build_backbone(), CLASSES, **{"optimizer": SGD, "batch_norm": "frozen", **options})


def test_metrics_of_an_epoch_are_means_over_samples_whatever_the_batches():
    images, target = draw(11)
    method = build(layers=["head"], optimizer=partial(torch.optim.SGD, lr=0.0))
    method.model.drop.p = 0.0
    trainer = build_trainer(1, limit_val_batches=1.0)
    fit_on(trainer, method, TensorData(images, target, batch_size=4))
    logits = build_backbone().model(images)
    loss, accuracy = cross_entropy(logits, target).item(), (logits.argmax(-1) == target).double().mean().item()
    for stage in ("train", "val"):
        assert trainer.callback_metrics[f"{stage}/loss"].item() == pytest.approx(loss, rel=1e-6)
        assert trainer.callback_metrics[f"{stage}/acc"].item() == pytest.approx(accuracy, rel=1e-6)


def test_steps_hand_their_outputs_to_callbacks():
    method, (images, target) = build().eval(), draw(5)
    method.log = lambda *_, **__: None
    batch = Batch(images, target, torch.arange(5))
    expected = build_backbone().model(images)
    for step in (method.training_step, method.validation_step, method.test_step):
        got = step(batch, 0)
        assert torch.allclose(got["logits"], expected, rtol=1e-12)
        assert got["loss"].item() == pytest.approx(cross_entropy(expected, target).item(), rel=1e-12)
    assert not method.training_step(batch, 0)["logits"].requires_grad


def test_a_batch_without_samples_counts_for_nothing():
    method = build().eval()
    method.log = lambda *_, **__: None
    images, target = draw(5)
    method.validation_step(Batch(images, target, torch.arange(5)), 0)
    got = method.validation_step(Batch(images[:0], target[:0], torch.arange(0)), 1)
    assert got["logits"].shape == (0, 3)
    values = method.stage_metrics["val_metrics"].compute()
    right = build_backbone().model(images).argmax(-1) == target
    assert values["val/acc"].item() == pytest.approx(right.double().mean().item())
    assert method.stage_means["val_loss"].count == 5


def test_a_schedule_of_a_run_without_an_end_is_refused():
    with pytest.raises(ValueError, match=r"trainer\.max_epochs or \+trainer\.max_steps, or method\.scheduler=null"):
        fit_on(build_trainer(-1), build(scheduler=cosine), TensorData(*draw(6)))


def test_a_run_that_diverges_names_the_rate_it_began_with():
    method = build(optimizer=partial(torch.optim.SGD, lr=math.inf), scheduler=cosine)
    with pytest.raises(FloatingPointError, match=r"epoch \d is nan.*method\.optimizer\.lr, now inf"):
        fit_on(build_trainer(3), method, TensorData(*draw(6), batch_size=3))


def test_the_random_state_goes_into_checkpoints_and_comes_back():
    method, checkpoint = build(), {}
    torch.manual_seed(3)
    method.on_save_checkpoint(checkpoint)
    expected = torch.rand(3)
    other = build()
    other.on_load_checkpoint(checkpoint)
    assert not torch.equal(torch.rand(3), expected)
    other.trainer = build_trainer(1)
    other.on_train_start()
    assert torch.equal(torch.rand(3), expected)
    other.on_train_start()  # once only
    assert not torch.equal(torch.rand(3), expected)


def test_groups_of_the_optimizer_follow_the_layers():
    method = build(layers=["head", "stem"], group_lr={"head": 3.0})
    groups = method.configure_optimizers().param_groups
    assert [(group["name"], group["lr"]) for group in groups] == [("stem", 0.1), ("head", pytest.approx(0.3))]
    names = {id(p): n for n, p in method.model.named_parameters()}
    assert [[names[id(p)] for p in group["params"]] for group in groups] == [
        ["conv1.weight", "bn1.weight", "bn1.bias"], ["fc.weight", "fc.bias"],
    ]  # fmt: skip


def test_a_method_without_a_loss_says_so():
    class Bare(Method):
        pass

    with pytest.raises(NotImplementedError, match="Bare must define `loss`"):
        Bare(build_backbone(), CLASSES, optimizer=SGD).loss(torch.zeros(1, 3), torch.zeros(1))
