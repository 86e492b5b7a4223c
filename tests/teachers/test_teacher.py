from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from lqf_lightning.teachers import EMANTeacher, EnsembleTeacher, FrozenTeacher, Teacher, View
from lqf_lightning.teachers.teacher import at_least_single, wide_type

VIEW = View(6, 1.0, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
IMAGES = torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(1))


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Dropout(0.5), nn.Flatten(), nn.Linear(64, 3))


def frozen(model: nn.Module) -> FrozenTeacher:
    return FrozenTeacher(model, ["a", "b", "c"], VIEW, "old")


BUILDERS: dict[str, Callable[[nn.Module], Teacher]] = {
    "frozen": frozen,
    "ensemble": lambda model: EnsembleTeacher([frozen(model), frozen(net(1).to(next(model.parameters()).dtype))]),
    "eman": EMANTeacher,
}
every_teacher = pytest.mark.parametrize("build", BUILDERS.values(), ids=BUILDERS)


@every_teacher
def test_its_owner_going_into_training_leaves_it_in_eval_mode(build: Callable[[nn.Module], Teacher]) -> None:
    owner = nn.ModuleDict({"student": net(), "teacher": build(net())}).train()
    assert owner["student"].training
    assert not any(module.training for module in owner["teacher"].modules())
    assert owner["teacher"].train() is owner["teacher"]
    assert not any(module.training for module in owner["teacher"].modules())


@every_teacher
def test_answers_draw_no_random_numbers_and_change_nothing(build: Callable[[nn.Module], Teacher]) -> None:
    teacher = build(net()).train()
    before = [value.clone() for value in teacher.state_dict().values() if isinstance(value, Tensor)]
    random = torch.get_rng_state()
    first = teacher(IMAGES)
    assert torch.equal(first, teacher(IMAGES))
    assert torch.equal(random, torch.get_rng_state())
    after = [value for value in teacher.state_dict().values() if isinstance(value, Tensor)]
    assert all(torch.equal(one, other) for one, other in zip(before, after, strict=True))


@every_teacher
def test_an_answer_depends_on_its_own_image_alone(build: Callable[[nn.Module], Teacher]) -> None:
    teacher = build(net()).train()
    whole, order = teacher(IMAGES), [3, 0, 4, 1, 2]
    assert torch.equal(teacher(IMAGES[order]), whole[order])
    for image, answer in zip(IMAGES, whole, strict=True):
        torch.testing.assert_close(teacher(image[None])[0], answer, rtol=1e-6, atol=1e-6)


@every_teacher
def test_no_gradient_reaches_it(build: Callable[[nn.Module], Teacher]) -> None:
    student, images = net(), IMAGES.clone().requires_grad_()
    teacher = build(net())
    owner = nn.ModuleDict({"student": student, "teacher": teacher})
    answer = teacher(images)
    assert not answer.requires_grad
    (student(images) * answer).sum().backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())
    assert all(parameter.grad is not None for parameter in student.parameters())
    trained = {id(parameter) for parameter in owner.parameters() if parameter.requires_grad}
    assert trained == {id(parameter) for parameter in student.parameters()}


@every_teacher
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_answers_have_at_least_single_precision(build: Callable[[nn.Module], Teacher], dtype: torch.dtype) -> None:
    expected = build(net().double())(IMAGES.double())
    teacher = build(net().to(dtype))
    answer = teacher(IMAGES.to(dtype))
    assert answer.dtype == wide_type(dtype)
    # A hundred products of about unit size per layer, each rounded to the type.
    tolerance = 10 * torch.finfo(dtype).eps
    torch.testing.assert_close(answer.double(), expected, rtol=tolerance, atol=tolerance)


@every_teacher
def test_answers_inside_autocast_have_at_least_single_precision(build: Callable[[nn.Module], Teacher]) -> None:
    teacher = build(net())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        answer = teacher(IMAGES)
    assert answer.dtype == torch.float32
    torch.testing.assert_close(answer, teacher(IMAGES), rtol=0.05, atol=0.05)


class Pair(NamedTuple):
    logits: Tensor
    rest: list[Tensor]


def test_nested_answers_keep_their_structure() -> None:
    half, index = torch.ones(2, dtype=torch.float16, requires_grad=True), torch.tensor([1, 2])
    got = at_least_single({"pair": Pair(half, [half, index]), "tuple": (half, None), "text": "x"})
    assert type(got["pair"]) is Pair
    assert type(got["pair"].rest) is list
    assert type(got["tuple"]) is tuple
    widened = [got["pair"].logits, got["pair"].rest[0], got["tuple"][0]]
    assert all(value.dtype == torch.float32 and not value.requires_grad for value in widened)
    assert torch.equal(got["pair"].rest[1], index)
    assert got["pair"].rest[1].dtype == torch.int64
    assert (got["tuple"][1], got["text"]) == (None, "x")


def test_widening_is_exact_and_leaves_wide_types_as_they_are() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        values = torch.randn(50).to(dtype)
        assert torch.equal(at_least_single(values).to(dtype), values)
    for dtype in (torch.float32, torch.float64, torch.complex64, torch.int32, torch.bool):
        assert at_least_single(torch.ones(2).to(dtype)).dtype == dtype
