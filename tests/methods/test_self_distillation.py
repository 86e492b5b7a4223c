import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from lqf_lightning.evaluate import evaluate
from lqf_lightning.methods import FocalDistillation, SelfDistillation
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on
from tiny import compose, run_tiny


def make(**options):
    """The average is another network from the start, as it is in the middle of a run."""
    backbone = build_backbone()
    backbone.model.drop.p = 0.0
    method = SelfDistillation(
        backbone, CLASSES, **{"optimizer": SGD, "momentum": 0.5, "momentum_warmup": False, **options}
    )
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        method.teacher.model.fc.weight.add_(torch.randn(3, 3, generator=generator, dtype=torch.float64))
    return method


def train(method, number=12, **options):
    trainer = build_trainer(1, **options)
    fit_on(trainer, method, TensorData(*draw(number)))
    return trainer


@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_a_step_distils_the_average_most_where_it_is_right(batch_norm):
    method = make(batch_norm=batch_norm, alpha=0.5, beta=3.0, strength=2.0)
    twin, (images, target) = copy.deepcopy(method), draw(12)
    trainer = train(method)
    old, new = twin.teacher.model(images).detach(), twin.model(images)
    right = (old.argmax(1) == target).double()
    assert 0 < right.mean() < 1
    distance = ((0.5 + 3 * right) * (new - old).square().mean(1)).mean()
    loss = cross_entropy(new, target) + 2 * distance
    loss.backward()
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(loss.item(), rel=1e-6)
    assert metrics["train/distillation"] == pytest.approx(distance.item(), rel=1e-6)
    assert metrics["train/reference_acc"] == pytest.approx(right.mean().item(), rel=1e-6)
    for name, parameter in twin.model.named_parameters():
        expected = parameter - 0.1 * parameter.grad
        assert torch.allclose(method.model.get_parameter(name), expected, rtol=1e-10, atol=1e-13), name


def test_the_average_follows_and_takes_no_gradient():
    method = make()
    before = copy.deepcopy(method.teacher.model.state_dict())
    train(method)
    for name, value in method.teacher.model.state_dict().items():
        if value.is_floating_point():
            expected = (before[name] + method.model.state_dict()[name]) / 2
            assert torch.allclose(value, expected, rtol=1e-12, atol=1e-15), name
    assert method.teacher.updates == 1
    assert all(parameter.grad is None for parameter in method.teacher.parameters())


@pytest.mark.parametrize(("name", "value"), [("reference", object()), ("influence", 0.5)])
def test_another_model_is_not_taken(name, value):
    with pytest.raises(ValueError, match=rf"takes no `{name}`.*method\.{name}=null, or method=focal_distillation"):
        make(**{name: value})


def test_options_of_focal_distillation_are_checked_as_there():
    with pytest.raises(ValueError, match=r"got 'l2'.*method\.distance=logits"):
        make(distance="l2")
    with pytest.raises(ValueError, match=r"got 2\. Set method\.momentum=0\.999"):
        make(momentum=2)


def test_a_reference_on_the_command_line_is_refused(tmp_path, folder_of_shapes):
    run_tiny(
        tmp_path / "old", folder_of_shapes, "method=finetune", "callbacks=[]", "test=false", "trainer.max_epochs=1"
    )
    old = f"method.reference={tmp_path}/old/checkpoints/last.ckpt"
    with pytest.raises(ValueError, match="takes no `reference`"):
        run_tiny(tmp_path / "new", folder_of_shapes, "method=self_distillation", old)


@pytest.mark.parametrize(("given", "meant"), [("bta", "beta"), ("momentun", "momentum"), ("teacher", None)])
def test_an_unknown_option_is_refused(given, meant, tmp_path, folder_of_shapes):
    with pytest.raises(ValueError, match=rf"`method\.{given}` is no option") as error:
        run_tiny(tmp_path, folder_of_shapes, "method=self_distillation", f"+method.{given}=1")
    if meant:
        assert f"Did you mean `method.{meant}`?" in str(error.value)


def test_its_checkpoint_is_evaluated_and_resumed(tmp_path, folder_of_shapes):
    options = ("method=self_distillation", "callbacks=[]", "test=false", "method.momentum=0.5")
    metrics = run_tiny(tmp_path / "run", folder_of_shapes, *options)
    checkpoint = tmp_path / "run" / "checkpoints" / "last.ckpt"
    stored = torch.load(checkpoint, weights_only=True)
    assert stored["networks"] == {"student": "model.", "teacher": "teacher.model."}
    assert stored["hyper_parameters"]["momentum"] == 0.5
    assert stored["hyper_parameters"]["beta"] == 5.0
    config = compose(
        f"checkpoint={checkpoint}", "split=val", "progress=none", "callbacks=[]", f"paths.output_dir={tmp_path}/eval",
        name="eval",
    )  # fmt: skip
    got = evaluate(config)
    for name in ("val/loss", "val/acc", "val/teacher_loss", "val/teacher_acc"):
        assert got[name] == pytest.approx(metrics[name], rel=1e-6)
    more = run_tiny(tmp_path / "run", folder_of_shapes, *options, "trainer.max_epochs=3")
    assert torch.load(checkpoint, weights_only=True)["state_dict"]["teacher._extra_state"] == 6
    assert more["train/distillation"] > 0


def test_it_is_focal_distillation_from_a_model_that_stays_where_the_average_does():
    assert issubclass(SelfDistillation, FocalDistillation)
    method = make(momentum=1.0)
    before = copy.deepcopy(method.teacher.model.state_dict())
    train(method)
    after = method.teacher.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items() if value.is_floating_point())
