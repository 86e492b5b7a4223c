import math

import pytest
import timm
import torch
from lightning import Callback
from torch import nn

from lqf_lightning.evaluate import evaluate
from lqf_lightning.methods import BYOL, Finetune, MoCo
from lqf_lightning.teachers import EMANTeacher, MomentumSchedule
from methods.paired import PairData, buffers, build
from methods.tensors import CLASSES, SGD, TensorData, build_backbone, build_trainer, draw, fit_on, snapshot
from tiny import compose, run_tiny


class Record(Callback):
    """The student after every optimizer step, and what the teacher kept of itself."""

    def on_train_start(self, trainer, pl_module):
        self.states, self.momenta, self.first = [], [], snapshot(pl_module.averaged_teacher.model)
        update = pl_module.averaged_teacher.update

        def watched():
            self.states.append(snapshot(pl_module.model))
            self.momenta.append(update())
            return self.momenta[-1]

        pl_module.averaged_teacher.update = watched


def average(record):
    """Closed form: what the teacher is by the products of the momenta."""
    values = {name: value.double() for name, value in record.first.items()}
    for state, momentum in zip(record.states, record.momenta, strict=True):
        values = {name: momentum * value + (1 - momentum) * state[name].double() for name, value in values.items()}
    return values


def check_average(record, teacher, rtol=1e-12):
    state = teacher.model.state_dict()
    for name, expected in average(record).items():
        if name.endswith("num_batches_tracked"):
            assert state[name] == record.states[-1][name]
        else:
            assert torch.allclose(state[name].double(), expected, rtol=rtol, atol=rtol * 1e-3), name


def train(method, batches=7, epochs=2, **options):
    record, size = Record(), 3
    trainer = build_trainer(epochs, record, **options)
    fit_on(trainer, method, TensorData(*draw(batches * size), batch_size=size))
    return record, trainer


def test_the_average_follows_once_per_optimizer_step_whatever_is_accumulated():
    method = build_finetune(momentum=0.6)
    record, trainer = train(method, accumulate_grad_batches=3)
    assert trainer.global_step == len(record.momenta) == method.teacher.updates == 6  # the last window has one batch
    assert [state["bn1.num_batches_tracked"].item() for state in record.states] == [3, 6, 7, 10, 13, 14]
    check_average(record, method.teacher)


def build_finetune(**options):
    backbone = build_backbone()
    backbone.model.drop.p = 0.0
    return Finetune(backbone, CLASSES, **{"optimizer": SGD, "teacher": "eman", "momentum_warmup": False, **options})


def test_what_is_kept_ends_with_the_run_on_a_cosine():
    method = build_finetune(momentum=0.9, momentum_schedule="cosine")
    record, _ = train(method, accumulate_grad_batches=3)
    assert record.momenta == pytest.approx([1 - 0.1 * (math.cos(math.pi * t / 6) + 1) / 2 for t in range(6)])
    assert method.teacher.momentum.at(method.teacher.updates, method.teacher.total_updates) == 1
    check_average(record, method.teacher)


def test_a_cosine_is_laid_out_over_a_run_that_steps_end():
    record, _ = train(build_finetune(momentum=0.5, momentum_schedule="cosine"), epochs=-1, max_steps=10)
    assert record.momenta[5] == pytest.approx(0.75)
    assert len(record.momenta) == 10


def test_warmup_keeps_less_at_first():
    record, _ = train(build_finetune(momentum=0.3, momentum_warmup=True), batches=6)
    assert record.momenta == [1 / 10, 2 / 11, 3 / 12, *[0.3] * 9]


def test_a_teacher_that_keeps_nothing_is_the_student():
    method = build_finetune(momentum=0.0)
    train(method)
    for name, value in method.model.state_dict().items():
        assert torch.equal(method.teacher.model.state_dict()[name], value), name


@pytest.mark.parametrize(("name", "statistics"), [("eman", "averaged"), ("ema_copied", "copied")])
def test_names_of_teachers_are_what_they_do_with_statistics(name, statistics):
    method = build_finetune(teacher=name, momentum=0.5)
    before = buffers(method.teacher.model)
    train(method)
    after, student = buffers(method.teacher.model), buffers(method.model)
    assert method.teacher.statistics == statistics
    assert not any(torch.equal(value, after[key]) for key, value in before.items())
    copied = [torch.equal(value, after[key]) for key, value in student.items()]
    assert all(copied) == (name == "ema_copied")


def test_batch_statistics_need_a_teacher_that_is_asked():
    with pytest.raises(ValueError, match=r"never asks it in training.*Set method\.teacher=eman or ema_copied"):
        build_finetune(teacher="ema")


class Mine(Finetune):
    """A method as a user writes it."""

    def __init__(self, *arguments, **options):
        super().__init__(*arguments, **options)
        self.slow = EMANTeacher(self.model, momentum=0.5)


def test_a_teacher_of_a_users_own_method_is_followed_and_evaluated(tmp_path):
    backbone = build_backbone()
    method = Mine(backbone, CLASSES, optimizer=SGD)
    images, target = draw(20, seed=5)
    record = Record()
    trainer = build_trainer(3, record, limit_val_batches=1.0)
    fit_on(trainer, method, TensorData(*draw(12), batch_size=4, val=(images, target)))
    assert method.slow.updates == 9
    check_average(record, method.slow)
    answers = method.slow(images)
    assert trainer.callback_metrics["val/teacher_acc"].item() == pytest.approx(
        (answers.argmax(-1) == target).double().mean().item(), rel=1e-6
    )
    expected = nn.functional.cross_entropy(answers, target).item()
    assert trainer.callback_metrics["val/teacher_loss"].item() == pytest.approx(expected, rel=1e-6)
    student = nn.functional.cross_entropy(method.model.eval()(images), target).item()
    assert trainer.callback_metrics["val/loss"].item() == pytest.approx(student, rel=1e-6)
    assert student != pytest.approx(expected, rel=1e-3)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    stored = torch.load(tmp_path / "run.ckpt", weights_only=True)
    assert stored["networks"] == {"student": "model.", "teacher": "slow.model."}
    (tested,) = build_trainer(0).test(Mine(build_backbone(3), CLASSES, optimizer=SGD), TensorData(images, target),
                                      tmp_path / "run.ckpt", verbose=False, weights_only=True)  # fmt: skip
    assert tested["test/teacher_loss"] == pytest.approx(expected, rel=1e-6)


def test_every_teacher_is_followed_wherever_it_is_registered():
    method = build_finetune(momentum=0.9)
    method.others = nn.ModuleList([EMANTeacher(method.model, 0.5), EMANTeacher(method.model.fc, 0.0)])
    train(method)
    assert [teacher.updates for teacher in method.others] == [14, 14]
    assert torch.equal(method.others[1].model.weight, method.model.fc.weight)
    assert set(method.networks()) == {"student", "teacher"}
    assert method.networks()["teacher"].model is method.teacher.model


def test_a_teacher_of_a_part_alone_predicts_nothing():
    method = build_finetune(teacher=None)
    method.part = EMANTeacher(method.model.conv2, 0.5)
    assert not method.teacher_predicts
    assert set(method.networks()) == {"student"}
    trainer = build_trainer(1, limit_val_batches=1.0)
    fit_on(trainer, method, TensorData(*draw(6), batch_size=3))
    assert method.part.updates == 2
    assert "val/teacher_acc" not in trainer.callback_metrics


METHODS = {
    "finetune": lambda: build_finetune(momentum=0.5),
    "moco": lambda: build(MoCo, queue_size=12, momentum=0.5),
    "byol": lambda: build(BYOL, hidden_width=8, projection_width=4, momentum=0.5),
}


class Modes(Callback):
    """Which parts of the teacher are in training mode before each batch, validation in between."""

    def __init__(self):
        self.training, self.moved = [], []

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        self.training.append([module for module in pl_module.teacher.modules() if module.training])
        self.before = buffers(pl_module.teacher)

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.moved += [n for n, v in buffers(pl_module.teacher).items() if not torch.equal(v, self.before[n])]


@pytest.mark.parametrize("name", METHODS)
def test_the_teacher_never_uses_or_moves_batch_statistics_and_no_gradient_reaches_it(name):
    method, modes = METHODS[name](), Modes()
    if name == "finetune":  # ask it in training too
        inner = method.training_loss
        method.training_loss = lambda logits, batch: inner(logits, batch) + 0 * method.teacher(batch.input).sum()
    trainer = build_trainer(2, modes, limit_val_batches=1.0)
    data = TensorData if name == "finetune" else PairData
    fit_on(trainer, method, data(*draw(12), batch_size=6))
    assert modes.training == [[]] * 4
    assert modes.moved == []
    method.train()
    assert not any(module.training for module in method.teacher.modules())
    assert any(module.training for module in method.backbone.model.modules())
    optimized = {id(p) for group in trainer.optimizers[0].param_groups for p in group["params"]}
    assert not optimized & {id(p) for p in method.teacher.parameters()}
    assert all(p.grad is None and not p.requires_grad for p in method.teacher.parameters())
    assert optimized == {id(p) for p in method.parameters() if p.requires_grad}


def test_in_bfloat16_the_average_is_kept_in_single_precision():
    backbone = build_backbone(dtype=torch.float32)
    backbone.model.drop.p = 0.0
    method = Finetune(backbone, CLASSES, optimizer=SGD, teacher="eman", momentum=0.999, momentum_warmup=False)
    record = Record()
    trainer = build_trainer(2, record, precision="bf16-true", limit_val_batches=1.0)
    fit_on(trainer, method, TensorData(*draw(12, dtype=torch.float32), batch_size=3))
    assert {p.dtype for p in method.model.parameters()} == {torch.bfloat16}
    assert {t.dtype for t in (*method.teacher.parameters(), *buffers(method.teacher).values())} == {torch.float32}
    check_average(record, method.teacher, rtol=1e-5)
    moved = method.teacher.model.fc.weight - record.first["fc.weight"]
    assert 0 < moved.abs().max() < 2**-9  # steps that bfloat16 would round away
    assert trainer.callback_metrics["val/teacher_loss"].isfinite()


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory, folder_of_shapes):
    """Runs whose students and averages differ: a momentum of one half, and large steps."""
    root = tmp_path_factory.mktemp("averaged")
    options = {
        "finetune": ["method.teacher=eman", "method.optimizer.lr=0.05"],
        "moco": ["method.queue_size=24", "method.optimizer.lr=0.05"],
        "lqf": ["method/optimizer=sgd", "method.optimizer.lr=1e-4"],
    }
    metrics = {}
    for name, chosen in options.items():
        momentum = [] if name == "lqf" else ["method.momentum=0.5", "method.momentum_warmup=false"]
        metrics[name] = run_tiny(
            root / name, folder_of_shapes, f"method={name}", *chosen, *momentum, "callbacks=[]", "test=false"
        )
    return root, metrics


def read(root, name):
    return torch.load(root / name / "checkpoints" / "last.ckpt", weights_only=True)


@pytest.mark.parametrize(("name", "trained"), [("finetune", True), ("moco", False)])
def test_checkpoints_say_where_the_plain_networks_are(name, trained, checkpoints):
    stored = read(checkpoints[0], name)
    expected = {"student": "model.", "teacher": "teacher.model."}
    if name == "moco":
        expected = {"student": "student.model.", "teacher": "teacher.model.model."}
    assert stored["networks"] == expected
    assert stored["head_is_trained"] is trained
    found = {}
    for part, prefix in expected.items():
        network = timm.create_model("test_resnet", num_classes=3)
        state = {k.removeprefix(prefix): v for k, v in stored["state_dict"].items() if k.startswith(prefix)}
        network.load_state_dict(state, strict=True)
        found[part] = state
    head = [key for key in found["student"] if key.startswith("fc.")]
    assert len(head) == 2
    for key, value in found["student"].items():
        same = torch.equal(value, found["teacher"][key])
        assert same == (key.endswith("num_batches_tracked") or (not trained and key in head)), key


def test_linearized_methods_have_no_plain_network(checkpoints):
    assert read(checkpoints[0], "lqf")["networks"] == {}


def test_what_is_reported_of_the_average_is_what_the_exported_network_does(checkpoints, tmp_path, folder_of_shapes):
    root, metrics = checkpoints
    exported = tmp_path / "network.ckpt"
    stored = read(root, "finetune")
    state = {k[len("teacher.model.") :]: v for k, v in stored["state_dict"].items() if k.startswith("teacher.model.")}
    torch.save(state, exported)
    again = run_tiny(
        tmp_path / "again", folder_of_shapes, "method=finetune", f"backbone.weights={exported}", "callbacks=[]",
        "method.optimizer.lr=0", "method.batch_norm=frozen", "trainer.max_epochs=1", "test=false",
    )  # fmt: skip
    assert again["val/acc"] == metrics["finetune"]["val/teacher_acc"]
    assert again["val/loss"] == pytest.approx(metrics["finetune"]["val/teacher_loss"], rel=1e-6)
    assert again["val/loss"] != pytest.approx(metrics["finetune"]["val/loss"], rel=1e-4)


@pytest.mark.parametrize("name", ["finetune", "moco"])
def test_evaluation_of_a_checkpoint_reports_the_average_too(name, checkpoints, tmp_path):
    root, metrics = checkpoints
    config = compose(
        f"checkpoint={root}/{name}/checkpoints/last.ckpt", "split=val", "progress=none", "callbacks=[]",
        f"paths.output_dir={tmp_path}", name="eval",
    )  # fmt: skip
    got = evaluate(config)
    for key in ("val/loss", "val/acc", "val/teacher_loss", "val/teacher_acc"):
        assert got[key] == pytest.approx(metrics[name][key], rel=1e-6), key


def test_asking_a_teacher_that_is_not_there_names_the_override():
    with pytest.raises(RuntimeError, match=r"Finetune has no averaged teacher\. Set method\.teacher=eman"):
        build_finetune(teacher=None).teacher_logits(draw(2)[0])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"teacher": "swa"}, r"eman, ema, ema_copied, got 'swa'\. Set method\.teacher=eman"),
        ({"momentum": 1.5}, r"got 1\.5\. Set method\.momentum=0\.999"),
        ({"momentum_schedule": "linear"}, r"got 'linear'.*method\.momentum_schedule=constant"),
    ],
)
def test_wrong_options_name_the_override(options, message):
    with pytest.raises(ValueError, match=message):
        build_finetune(**options)


def test_a_cosine_of_a_run_without_an_end_is_refused():
    method = build_finetune(momentum_schedule="cosine")
    with pytest.raises(ValueError, match=r"max_epochs=-1"):
        fit_on(build_trainer(-1), method, TensorData(*draw(6)))
    assert MomentumSchedule(0.9).at(10**6) == 0.9


def test_a_method_that_keeps_its_network_elsewhere_can_be_saved():
    method = build_finetune(teacher=None)
    method.model = torch.nn.Linear(1, 1)
    checkpoint = {}
    method.on_save_checkpoint(checkpoint)
    assert checkpoint["networks"] == {}
