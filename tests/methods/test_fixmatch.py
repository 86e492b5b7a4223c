import copy

import pytest
import torch
from torch.nn.functional import cross_entropy

from lqf_lightning.methods import Finetune, FixMatch
from methods.paired import LabeledAndUnlabeled, build, views
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on, snapshot
from tiny import run_tiny


def make(**options):
    """Teacher and student differ from the start, and the outputs are large enough to be sure of something."""
    method = build(
        FixMatch, **{"unlabeled_weight": 2.0, "unlabeled_ratio": 2, "threshold": 0.6, "momentum": 0.5, **options}
    )
    with torch.no_grad():
        method.model.fc.weight.mul_(4)
        if method.averaged_teacher is not None:
            generator = torch.Generator().manual_seed(3)
            noise = torch.randn(3, 3, generator=generator, dtype=torch.float64)
            method.teacher.model.fc.weight.copy_(4 * method.teacher.model.fc.weight + 2 * noise)
    return method


def train(method, number=8, batch_size=4, ratio=2, epochs=1, trainer=None, **options):
    trainer = trainer or build_trainer(epochs)
    fit_on(trainer, method, LabeledAndUnlabeled(*draw(number), batch_size, ratio, **options))
    return trainer


def parts(method, number=8, batch_size=4):
    """Outputs on the labeled, weak and strong images of the first step."""
    images, target = draw(number)
    weak, strong = views(images)
    labeled = images[:batch_size]
    if method.averaged_teacher is None:
        together = method.model(torch.cat([labeled, weak, strong]))
        return (*together.split([batch_size, number, number]), target[:batch_size])
    weak_logits = method.teacher.model(weak)
    together = method.model(torch.cat([labeled, strong]))
    return together[:batch_size], weak_logits, together[batch_size:], target[:batch_size]


def objective(method):
    logits, weak, strong, target = parts(method)
    confidence, guess = weak.detach().softmax(1).max(1)
    chosen = [row for row in range(len(weak)) if confidence[row] >= method.threshold]
    assert 0 < len(chosen) < len(weak)
    unlabeled = sum(cross_entropy(strong[row], guess[row]) for row in chosen) / len(weak)
    return cross_entropy(logits, target), unlabeled, len(chosen) / len(weak)


@pytest.mark.parametrize("teacher", ["eman", "ema_copied", None])
@pytest.mark.parametrize("batch_norm", ["train", "frozen"])
def test_a_step_follows_the_objective_through_labeled_and_strong_images_alone(teacher, batch_norm):
    method = make(teacher=teacher, batch_norm=batch_norm)
    confidence = parts(copy.deepcopy(method))[1].softmax(1).amax(1).sort().values
    method.threshold = confidence[3:5].mean().item()  # half of them
    twin = copy.deepcopy(method)
    trainer = train(method)
    labeled, unlabeled, share = objective(twin)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert metrics["train/loss"] == pytest.approx(labeled.item(), rel=1e-6)
    assert metrics["train/unlabeled_loss"] == pytest.approx(unlabeled.item(), rel=1e-6)
    assert metrics["train/selected"] == pytest.approx(share, rel=1e-6)
    (labeled + 2.0 * unlabeled).backward()
    for name, parameter in twin.model.named_parameters():
        expected = parameter - 0.1 * parameter.grad
        assert torch.allclose(method.model.get_parameter(name), expected, rtol=1e-10, atol=1e-13), name
        assert parameter.grad.norm() > 1e-6


def test_no_gradient_reaches_the_branch_that_guesses():
    method = make(teacher=None)
    images, _ = draw(8)
    weak, strong = (view.requires_grad_() for view in views(images))
    logits, weak_logits, strong_logits = method._outputs(images[:4], weak, strong)
    assert not weak_logits.requires_grad
    with_teacher = make()
    guesses = with_teacher._outputs(images[:4], weak, strong)[1]
    assert not guesses.requires_grad
    train(with_teacher)
    assert all(p.grad is None for p in with_teacher.teacher.parameters())
    assert logits.requires_grad and strong_logits.requires_grad  # noqa: PT018  one statement: both train


def test_without_weight_it_is_supervised_training_beside_the_strong_images():
    method = make(unlabeled_weight=0.0)
    model = copy.deepcopy(method.model).train()
    train(method)
    images, target = draw(8)
    optimizer = SGD(model.parameters())
    strong = views(images)[1]
    cross_entropy(model(torch.cat([images[:4], strong]))[:4], target[:4]).backward()
    optimizer.step()
    for name, value in model.state_dict().items():
        assert torch.equal(method.model.state_dict()[name], value), name


def test_with_frozen_statistics_and_without_weight_it_is_finetuning():
    method, plain = make(unlabeled_weight=0.0, batch_norm="frozen"), make(batch_norm="frozen")
    plain = Finetune(plain.backbone, CLASSES, optimizer=SGD, batch_norm="frozen")
    train(method)
    fit_on(build_trainer(1), plain, TensorData(*(part[:4] for part in draw(8)), batch_size=4))
    for name, value in plain.model.state_dict().items():
        assert torch.allclose(method.model.state_dict()[name], value, rtol=1e-12, atol=1e-15), name


@pytest.mark.parametrize(("threshold", "share"), [(0.0, 1.0), (1.01, 0.0)])
def test_the_threshold_selects_all_or_nothing(threshold, share):
    method = make(threshold=threshold)
    metrics = train(method).callback_metrics
    assert metrics["train/selected"] == share
    assert (metrics["train/unlabeled_loss"] > 0) == (share == 1)


def test_what_is_logged_is_the_mean_over_samples_of_the_epoch():
    method = make(optimizer=lambda groups: torch.optim.SGD(groups, lr=0.0), momentum=1.0, batch_norm="frozen")
    trainer = train(method, number=12, batch_size=2, ratio=2)  # three steps of two labeled and four unlabeled images
    images, target = draw(12)
    weak, strong = views(images)
    method.eval()
    confidence, guess = method.teacher(weak).softmax(1).max(1)
    selected = confidence >= 0.6
    losses = cross_entropy(method.model(strong), guess, reduction="none") * selected
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    assert trainer.global_step == 3
    assert metrics["train/selected"] == pytest.approx(selected.double().mean().item(), rel=1e-6)
    assert metrics["train/unlabeled_loss"] == pytest.approx(losses.mean().item(), rel=1e-6)
    labeled = cross_entropy(method.model(images[:6]), target[:6]).item()
    assert metrics["train/loss"] == pytest.approx(labeled, rel=1e-6)


def test_the_student_and_the_teacher_are_evaluated_apart():
    method, others = make(), draw(20, seed=5)
    trainer = build_trainer(2, limit_val_batches=1.0)
    train(method, trainer=trainer, val=others)
    images, target = others
    method.eval()
    answers = {"val/acc": method.model(images), "val/teacher_acc": method.teacher(images)}
    for name, logits in answers.items():
        expected = (logits.argmax(1) == target).double().mean().item()
        assert trainer.callback_metrics[name].item() == pytest.approx(expected, rel=1e-6)
    assert not torch.equal(*answers.values())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": -0.1}, r"got -0\.1\. Set method\.threshold=0\.7"),
        ({"threshold": float("nan")}, r"got nan\. Set method\.threshold=0\.7"),
        ({"unlabeled_weight": -1.0}, r"got -1\.0\. Set method\.unlabeled_weight=10"),
        ({"unlabeled_weight": float("inf")}, r"got inf\. Set method\.unlabeled_weight=10"),
        ({"unlabeled_ratio": 0}, r"got 0\. Set method\.unlabeled_ratio=5"),
        ({"unlabeled_ratio": 1.5}, r"got 1\.5\. Set method\.unlabeled_ratio=5"),
        ({"teacher": "frozen"}, r"got 'frozen'\. Set method\.teacher=eman"),
        ({"batch_norm": "off"}, r"got 'off'\. Set method\.batch_norm=train"),
    ],
)
def test_wrong_options_name_the_override(options, message):
    with pytest.raises(ValueError, match=message):
        make(**options)


def run(folder, root, *overrides):
    metrics = run_tiny(folder, root, "method=fixmatch", "callbacks=[]", "test=false", *overrides)
    return metrics, torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)


def test_an_epoch_is_a_pass_over_all_training_images(tmp_path, folder_of_shapes):
    options = ("data.batch_size=4", "method.unlabeled_ratio=3", "data.label_fraction=0.25", "method.threshold=0")
    metrics, stored = run(tmp_path, folder_of_shapes, *options)
    assert stored["global_step"] == 2 * 24 // 12
    assert metrics["train/selected"] == 1
    assert {"val/acc", "val/teacher_acc"} <= metrics.keys()
    assert stored["hyper_parameters"]["unlabeled_ratio"] == 3


def test_fewer_labels_than_a_batch_repeat_within_it(tmp_path, folder_of_shapes):
    options = ("data.batch_size=8", "method.unlabeled_ratio=3", "data.labels_per_class=1", "method.teacher=null")
    metrics, stored = run(tmp_path, folder_of_shapes, *options)
    assert stored["global_step"] == 2
    assert stored["networks"] == {"student": "model."}
    assert metrics["train/loss"] > 0
    assert "val/teacher_acc" not in metrics


def test_an_unlabeled_ratio_beyond_the_images_is_refused(tmp_path, folder_of_shapes):
    with pytest.raises(ValueError, match=r"24 training images.*method\.unlabeled_ratio=5"):
        run(tmp_path, folder_of_shapes)


def test_the_teacher_of_a_fixmatch_run_averages_the_network_alone():
    method = make()
    before = snapshot(method)
    train(method, epochs=2)
    names = set(method.teacher.model.state_dict())
    assert names == set(build_backbone().model.state_dict())
    moved = {n for n in names if not torch.equal(method.teacher.model.state_dict()[n], before[f"teacher.model.{n}"])}
    assert moved == names
