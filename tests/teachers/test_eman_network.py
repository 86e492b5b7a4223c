import copy
import pickle
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from lqf_lightning.teachers import EMANTeacher


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def draw(seed: int) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_each_answer_depends_on_its_image_alone_where_batch_statistics_tie_images_together() -> None:
    def influence(teacher: EMANTeacher) -> Tensor:
        images = draw(0).requires_grad_()
        answers = teacher.train().model(images)
        rows = [
            torch.autograd.grad(answer.sum(), images, retain_graph=True)[0].abs().sum((1, 2, 3)) for answer in answers
        ]
        return torch.stack(rows)

    apart, tied = influence(EMANTeacher(net().double())), influence(EMANTeacher(net().double(), statistics="batch"))
    others = ~torch.eye(6, dtype=torch.bool)
    assert (apart[others] == 0).all()
    assert (apart[~others] > 0).all()
    assert (tied[others] > 0).all()


def test_batch_statistics_are_those_of_the_batch_while_its_owner_trains() -> None:
    student = nn.Sequential(*net()[:3], nn.Dropout(0.5), *net()[3:])
    teacher, images = EMANTeacher(student, 0.5, statistics="batch"), draw(0).float()
    owner = nn.ModuleList([teacher]).train()
    assert [module for module in teacher.modules() if module.training] == [teacher.model[1]]
    expected = copy.deepcopy(net()).train()(images)
    torch.testing.assert_close(teacher(images), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(teacher(images[:1])[0], expected[0], atol=1e-3)
    owner.eval()
    torch.testing.assert_close(teacher(images[:1]), teacher(images)[:1], rtol=1e-5, atol=1e-5)


def test_it_starts_as_the_student_is_and_shares_nothing_with_it() -> None:
    student = net().train()
    student(draw(0).float()).sum().backward()
    teacher = EMANTeacher(student)
    assert all(torch.equal(value, student.state_dict()[name]) for name, value in teacher.model.state_dict().items())
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in teacher.parameters())
    assert student.training
    assert all(parameter.requires_grad and parameter.grad is not None for parameter in student.parameters())
    assert {name.split(".")[0] for name in teacher.state_dict()} == {"model", "_extra_state"}


def test_parts_of_the_student_have_counterparts() -> None:
    student = nn.Sequential(net(), nn.Linear(3, 3))
    teacher = EMANTeacher(student)
    assert teacher.copied(student) is teacher.model
    assert teacher.copied(student[0][1]) is teacher.model[0][1]
    assert teacher.copied(nn.Linear(3, 3)) is None


@torch.no_grad()
def test_integers_and_flags_are_copied_and_what_is_not_saved_is_left_alone() -> None:
    student = nn.Linear(1, 1)
    student.register_buffer("count", torch.tensor(3))
    student.register_buffer("flags", torch.tensor([True, False]))
    student.register_buffer("scratch", torch.ones(1), persistent=False)
    teacher = EMANTeacher(student, 0.5)
    student.count.fill_(100)
    student.flags.logical_not_()
    student.scratch.fill_(7)
    teacher.update()
    assert (teacher.model.count.item(), teacher.model.flags.tolist()) == (100, [False, True])
    assert (teacher.model.count.dtype, teacher.model.flags.dtype) == (torch.int64, torch.bool)
    assert teacher.model.scratch.item() == 1


@torch.no_grad()
def test_weights_that_are_shared_are_averaged_once() -> None:
    student = nn.Sequential(nn.Linear(1, 1, bias=False), nn.Linear(1, 1, bias=False))
    student[1].weight = student[0].weight.fill_(0)
    teacher = EMANTeacher(student, 0.5)
    student[0].weight.fill_(1)
    teacher.update()
    assert teacher.model[0].weight is teacher.model[1].weight
    assert teacher.model[0].weight.item() == 0.5


@torch.no_grad()
def test_weights_that_do_not_train_stay_as_they_are_and_others_move() -> None:
    student = net()
    student[0].requires_grad_(False)
    teacher = EMANTeacher(student, 0.999)
    student[4].weight.add_(1)
    for _ in range(50):
        teacher.update()
    assert torch.equal(teacher.model[0].weight, student[0].weight)
    torch.testing.assert_close(student[4].weight - teacher.model[4].weight, torch.full((3, 64), 0.999**50))


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_small_steps_towards_a_half_precision_student_are_not_lost(dtype: torch.dtype) -> None:
    student = nn.Linear(1, 1, bias=False).to(dtype)
    student.weight.fill_(1)
    teacher, narrow = EMANTeacher(student, 0.9999), student.weight.clone()
    student.weight.fill_(2)
    for _ in range(100):
        teacher.update()
        narrow.lerp_(student.weight, 1e-4)
    assert teacher.model.weight.dtype == torch.float32
    assert teacher.model.weight.item() == pytest.approx(2 - 0.9999**100, abs=100 * 2**-23)
    assert narrow.item() == 1
    assert student.weight.dtype == dtype


@torch.no_grad()
@pytest.mark.parametrize("move", ["half", "bfloat16", "float", "double"])
def test_converting_its_owner_never_narrows_it(move: str) -> None:
    student = net()
    owner = nn.ModuleDict({"student": student, "teacher": EMANTeacher(student, 0.5)})
    before = owner["teacher"].model[0].weight.clone()
    getattr(owner, move)()
    teacher: Any = owner["teacher"]
    wide = torch.float64 if move == "double" else torch.float32
    assert {tensor.dtype for tensor in teacher.state_dict().values() if isinstance(tensor, Tensor)} == {
        wide, torch.int64,
    }  # fmt: skip
    assert torch.equal(teacher.model[0].weight, before.to(wide))
    student[0].weight.zero_()
    teacher.update()
    assert torch.equal(teacher.model[0].weight, (before / 2).to(wide))
    assert teacher(draw(0).to(student[0].weight.dtype)).dtype == wide


def test_it_moves_to_another_device_with_its_owner() -> None:
    student = net()
    owner = nn.ModuleDict({"student": student, "teacher": EMANTeacher(student, 0.5)}).to("meta", torch.bfloat16)
    assert {value.device.type for value in (*owner.parameters(), *owner.buffers())} == {"meta"}
    assert owner["teacher"].model[0].weight.dtype == torch.float32
    owner["teacher"].update()
    owner.to_empty(device="cpu")
    owner["teacher"].update()
    assert owner["teacher"].updates == 2


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda owner: pickle.loads(pickle.dumps(owner))])
def test_a_copy_of_its_owner_follows_the_copy_of_the_student(copied: Callable[[Any], Any]) -> None:
    student = net()
    first = nn.ModuleDict({"student": student, "teacher": EMANTeacher(student, 0.0)})
    first["teacher"].update()
    second = copied(first)
    assert second["teacher"].updates == 1
    with torch.no_grad():
        second["student"][0].weight.fill_(5)
    first["teacher"].update()
    second["teacher"].update()
    assert torch.equal(first["teacher"].model[0].weight, first["student"][0].weight)
    assert (second["teacher"].model[0].weight == 5).all()


@torch.no_grad()
def test_parametrized_weights_are_averaged_before_they_are_put_together() -> None:
    student = weight_norm(nn.Linear(3, 2, bias=False).double())
    teacher, before = EMANTeacher(student, 0.75), [part.clone() for part in student.parameters()]
    for part in student.parameters():
        part.mul_(torch.rand_like(part) + 0.5)
    teacher.update()
    length, direction = [0.75 * a + 0.25 * b for a, b in zip(before, student.parameters(), strict=True)]
    expected = length * direction / direction.norm(dim=1, keepdim=True)
    torch.testing.assert_close(teacher.model.weight, expected)
    x = torch.randn(4, 3).double()
    torch.testing.assert_close(teacher(x), x @ expected.T)


class Answer(NamedTuple):
    logits: Tensor
    index: Tensor


class Nested(nn.Linear):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Any:
        logits = super().forward(x) if scale is None else super().forward(x) * scale
        return {"answer": Answer(logits, logits.argmax(1)), "list": [logits]}


def test_it_takes_what_the_student_takes_and_returns_what_the_student_returns() -> None:
    student = Nested(3, 2)
    teacher, x, scale = EMANTeacher(student), torch.randn(4, 3), torch.tensor(2.0)
    answer, expected = teacher(x, scale), student(x, scale)
    assert type(answer["answer"]) is Answer
    assert torch.equal(answer["answer"].logits, expected["answer"].logits)
    assert torch.equal(answer["answer"].index, expected["answer"].index)
    assert not answer["list"][0].requires_grad
    assert EMANTeacher(nn.Embedding(5, 2))(torch.tensor([3])).shape == (1, 2)


@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda student: torch.compile(student, backend="eager")])
def test_wrapped_students_are_refused(wrap: Callable[[nn.Module], nn.Module]) -> None:
    with pytest.raises(TypeError, match=r"got a student wrapped in (DataParallel|OptimizedModule), expected"):
        EMANTeacher(wrap(net()))


def test_options_that_make_no_sense_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got 1\.5\. Set method\.momentum"):
        EMANTeacher(net(), 1.5)
    with pytest.raises(ValueError, match=r"got 'running'\. Set method\.teacher=eman"):
        EMANTeacher(net(), statistics="running")
    with pytest.raises(ValueError, match="holds an averaged teacher, which would be averaged too"):
        EMANTeacher(nn.ModuleList([EMANTeacher(net())]))


def test_a_student_whose_layers_changed_is_refused_at_the_next_update() -> None:
    student = net()
    teacher = EMANTeacher(student)
    before = teacher.model[0].weight.clone()
    student[4] = nn.Linear(64, 5)
    with torch.no_grad():
        student[0].weight.zero_()
    with pytest.raises(ValueError, match=r"4.weight \(3, 64\) against \(5, 64\)"):
        teacher.update()
    assert torch.equal(teacher.model[0].weight, before)
    assert teacher.updates == 0


@torch.no_grad()
def test_a_layer_put_in_place_of_one_of_the_same_shape_is_followed() -> None:
    student = net()
    teacher = EMANTeacher(student, 0.0)
    student[4] = nn.Linear(64, 3)
    teacher.update()
    assert torch.equal(teacher.model[4].weight, student[4].weight)
