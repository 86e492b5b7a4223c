from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from lqf_lightning.teachers import EMANTeacher
from ranks import run_on_ranks

STEPS, MOMENTUM = 4, 0.8
State = dict[str, Tensor]


class Owner(nn.Module):
    """Student and teacher; a teacher in a tuple is outside of what DDP synchronizes."""

    def __init__(self, inside: bool = True, **options: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.student = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2)).double()
        teacher = EMANTeacher(self.student, MOMENTUM, **options)
        self.hidden = (teacher,)
        if inside:
            self.teacher = teacher

    def forward(self, x: Tensor) -> Tensor:
        return self.student(x)


def draw(step: int, rank: int) -> Tensor:
    """A batch of this rank, whose statistics are those of no other."""
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randn(5, 3, generator=generator, dtype=torch.float64) + rank


def state(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items() if isinstance(value, Tensor)}


def follow(inside: bool, options: dict[str, Any]) -> dict[str, list[State]]:
    """States after every update, and of the teacher after the forward pass that comes next."""
    owner = Owner(inside, **options)
    wrapped, teacher = DistributedDataParallel(owner), owner.hidden[0]
    optimizer = torch.optim.SGD(owner.student.parameters(), lr=0.1)
    seen: dict[str, list[State]] = {"student": [], "teacher": [], "next forward": []}
    for step in range(STEPS):
        outputs = wrapped.train()(draw(step, dist.get_rank()))
        if step:
            seen["next forward"].append(state(teacher.model))
        optimizer.zero_grad()
        outputs.square().mean().backward()
        optimizer.step()
        teacher.update()
        seen["student"].append(state(owner.student))
        seen["teacher"].append(state(teacher.model))
    return seen


def gap(by_rank: list[State], names: str = "") -> float:
    """Largest difference between ranks, in entries whose name contains `names`."""
    return max((one[name] - by_rank[0][name]).abs().max().item() for one in by_rank for name in one if names in name)


def at(ranks: list[dict[str, list[State]]], moment: str, step: int) -> list[State]:
    return [rank[moment][step] for rank in ranks]


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
def test_weights_agree_after_every_update_and_statistics_after_the_next_forward_pass(inside: bool, world: int) -> None:
    """Statistics agree again only for a teacher inside the wrapped module; until then each rank has its own."""
    ranks = run_on_ranks(world, follow, inside, {})
    for step in range(STEPS):
        teachers = at(ranks, "teacher", step)
        assert all(gap(teachers, name) == 0 for name in ("weight", "bias", "tracked"))
        assert (gap(teachers, "running") > 1e-3) == (world > 1)
    for step in range(STEPS - 1):
        later = at(ranks, "next forward", step)
        assert (gap(later) == 0) == (inside or world == 1)
        first = later[0]
        assert all(torch.equal(value, ranks[0]["teacher"][step][name]) for name, value in first.items())


@pytest.mark.parametrize("world", [1, 2, 3])
@pytest.mark.parametrize("inside", [True, False], ids=["inside", "outside"])
@pytest.mark.parametrize("kind", ["averaged", "copied"])
def test_synchronized_statistics_agree_after_every_update_and_follow_the_mean(
    kind: str, inside: bool, world: int
) -> None:
    ranks = run_on_ranks(world, follow, inside, {"sync_statistics": True, "statistics": kind})
    start = state(Owner().student)
    for name in ("1.running_mean", "1.running_var"):
        expected = start[name]
        for step in range(STEPS):
            mean = sum(student[name] for student in at(ranks, "student", step)) / world
            expected = MOMENTUM * expected + (1 - MOMENTUM) * mean if kind == "averaged" else mean
            torch.testing.assert_close(ranks[0]["teacher"][step][name], expected, rtol=1e-12, atol=1e-14)
    assert all(gap(at(ranks, "teacher", step)) == 0 for step in range(STEPS))
    assert all((gap(at(ranks, "student", step), "running") > 1e-3) == (world > 1) for step in range(STEPS))


def test_synchronization_leaves_the_student_alone() -> None:
    plain, synchronized = (run_on_ranks(2, follow, True, {"sync_statistics": flag}) for flag in (False, True))
    for rank in range(2):
        for step in range(STEPS):
            one, other = plain[rank]["student"][step], synchronized[rank]["student"][step]
            assert all(torch.equal(one[name], other[name]) for name in one)


def save() -> dict[str, Any]:
    owner = Owner()
    wrapped = DistributedDataParallel(owner)
    optimizer = torch.optim.SGD(owner.student.parameters(), lr=0.1)
    for step in range(STEPS):
        wrapped(draw(step, dist.get_rank())).square().mean().backward()
        optimizer.step()
        owner.teacher.update()
    return {"checkpoint": owner.state_dict(), "answer": owner.teacher(draw(9, 0))}


@pytest.mark.parametrize("world", [2, 3])
def test_a_checkpoint_of_several_ranks_makes_the_same_teacher_on_one(world: int) -> None:
    saved = run_on_ranks(world, save)[0]
    owner = Owner()
    owner.load_state_dict(saved["checkpoint"])
    assert owner.teacher.updates == STEPS
    assert torch.equal(owner.teacher(draw(9, 0)), saved["answer"])


def refuse() -> str:
    with pytest.raises(TypeError, match="got a student wrapped in DistributedDataParallel") as caught:
        EMANTeacher(DistributedDataParallel(nn.Linear(2, 2)))
    return str(caught.value)


def test_a_student_wrapped_for_several_ranks_is_refused_on_each() -> None:
    assert len(set(run_on_ranks(2, refuse))) == 1
