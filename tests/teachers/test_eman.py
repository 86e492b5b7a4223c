import pickle
from collections.abc import Iterator
from typing import Any

import pytest
import timm
import torch
from lightning import LightningModule, Trainer
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from torch.utils.data import DataLoader

from lqf_lightning.methods.averaging import Averaging
from lqf_lightning.teachers import EMANTeacher, MomentumSchedule

State = dict[str, Tensor]
PLAIN, COSINE = MomentumSchedule(0.9), MomentumSchedule(0.8, "cosine")


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 3))


def draw(seed: int) -> Tensor:
    return torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def train(student: nn.Module, steps: int, first: int = 0) -> Iterator[int]:
    """Training steps, which move weights and statistics."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    dtype = next(student.parameters()).dtype
    for step in range(first, first + steps):
        optimizer.zero_grad()
        student.train()(draw(step).to(dtype)).square().mean().backward()
        optimizer.step()
        yield step


def state(module: nn.Module) -> State:
    return {name: value.clone() for name, value in module.state_dict().items()}


def floats(values: State) -> State:
    return {name: value for name, value in values.items() if value.is_floating_point()}


def same(one: State, other: State) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_a_momentum_of_zero_makes_it_the_student_bit_for_bit() -> None:
    student = net()
    teacher = EMANTeacher(student, 0.0)
    for _ in train(student, 3):
        teacher.update()
        assert same(state(teacher.model), state(student))
    assert student[1].num_batches_tracked == 3


def test_a_momentum_of_one_keeps_it_but_for_counters() -> None:
    student = net()
    teacher = EMANTeacher(student, 1.0)
    before = state(student)
    for _ in train(student, 3):
        teacher.update()
    after = state(teacher.model)
    assert same(floats(after), floats(before))
    assert after["1.num_batches_tracked"] == 3
    assert not any(torch.equal(value, state(student)[name]) for name, value in floats(before).items())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("schedule", [PLAIN, COSINE, MomentumSchedule(0.9, warmup=True)])
def test_it_is_the_weighted_sum_of_all_students(schedule: MomentumSchedule, dtype: torch.dtype) -> None:
    """Student i, counted from 1, weighs (1 - m_i) prod_{j > i} m_j, and the first one prod_j m_j."""
    steps, student = 12, net().to(dtype)
    teacher = EMANTeacher(student, schedule)
    teacher.total_updates = steps
    students = [state(student)]
    for _ in train(student, steps):
        teacher.update()
        students.append(state(student))
    momenta = [schedule.at(t, steps) for t in range(steps)]
    for name, value in floats(state(teacher.model)).items():
        expected = torch.zeros_like(value, dtype=torch.float64)
        for number, one in enumerate(students):
            weight = 1 - momenta[number - 1] if number else 1.0
            for momentum in momenta[number:]:
                weight *= momentum
            expected += weight * one[name].double()
        # Each update rounds three times, by half an ulp of at most the largest value.
        tolerance = 3 * steps * torch.finfo(dtype).eps * max(one[name].abs().max().item() for one in students)
        assert (value.double() - expected).abs().max().item() <= tolerance, name


def test_its_statistics_are_two_averages_of_the_batches_one_after_the_other() -> None:
    """The batch j steps back weighs (1 - m) b (m^(j+1) - (1-b)^(j+1)) / (m - (1-b)), for averages that start at 0."""
    m, b, steps, student = 0.95, 0.1, 25, net().double()
    teacher = EMANTeacher(student, m)
    seen: dict[str, list[Tensor]] = {"running_mean": [], "running_var": []}

    def record(_: nn.Module, inputs: tuple[Tensor]) -> None:
        seen["running_mean"].append(inputs[0].detach().mean((0, 2, 3)))
        seen["running_var"].append(inputs[0].detach().var((0, 2, 3)) - 1)  # variances start at 1

    student[1].register_forward_pre_hook(record)
    for _ in train(student, steps):
        teacher.update()
    for name, batches in seen.items():
        expected = sum(
            (1 - m) * b * (m ** (j + 1) - (1 - b) ** (j + 1)) / (m - (1 - b)) * batch
            for j, batch in enumerate(reversed(batches))
        )
        start = float(name == "running_var")
        got = teacher.model[1].get_buffer(name) - start
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-13)
        assert (got - (student[1].get_buffer(name) - start)).abs().max() > 1e-3


def test_the_baselines_average_weights_and_take_or_leave_statistics() -> None:
    student = net()
    teachers = {kind: EMANTeacher(student, 0.9, statistics=kind) for kind in ("averaged", "copied", "batch")}
    start = state(student)
    for _ in train(student, 4):
        for teacher in teachers.values():
            teacher.update()
    states, now = {kind: state(teacher.model) for kind, teacher in teachers.items()}, state(student)
    for name in start:
        if name.startswith("1.running") or name.endswith("tracked"):
            assert torch.equal(states["copied"][name], now[name])
            assert torch.equal(states["batch"][name], start[name])
        else:
            assert torch.equal(states["averaged"][name], states["copied"][name])
            assert torch.equal(states["averaged"][name], states["batch"][name])
    assert not torch.equal(states["averaged"]["1.running_mean"], now["1.running_mean"])


@torch.no_grad()
def test_counters_are_the_students_where_averages_of_integers_lag() -> None:
    student, images = net(), draw(0).float()
    teacher = EMANTeacher(student, 0.9)
    other = AveragedModel(student, use_buffers=True, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for _ in range(60):
        student(images)
        teacher.update()
        other.update_parameters(student)
    assert teacher.model[1].num_batches_tracked == student[1].num_batches_tracked == 60
    assert other.module[1].num_batches_tracked <= 51  # 1 / (1 - m) behind


@pytest.mark.parametrize("name", ["small", "tf_efficientnet_lite0"])
def test_it_agrees_with_the_averages_of_timm_and_torch(name: str) -> None:
    """Torch's first call copies, so that it must be primed; an unprimed one has forgotten the first weights."""
    torch.manual_seed(0)
    small = name == "small"
    student = net() if small else timm.create_model(name, num_classes=3)
    ema: dict[str, Any] = {"use_buffers": True, "multi_avg_fn": get_ema_multi_avg_fn(0.99)}
    teacher, timm_average = EMANTeacher(student, 0.99), ModelEmaV3(student, decay=0.99)
    primed, unprimed = AveragedModel(student, **ema), AveragedModel(student, **ema)
    primed.update_parameters(student)
    for _ in train(student, 30) if small else drift(student, 30):
        teacher.update()
        timm_average.update(student)
        for average in (primed, unprimed):
            average.update_parameters(student)
    own = state(teacher.model)
    for key, value in state(timm_average.module).items():
        torch.testing.assert_close(own[key], value, rtol=1e-6, atol=1e-6, msg=key)
    for key, value in floats(state(primed.module)).items():
        torch.testing.assert_close(own[key], value, rtol=1e-6, atol=1e-6, msg=key)
    gaps = [(own[key] - value).abs().max() for key, value in floats(state(unprimed.module)).items()]
    assert max(gaps) > 1e-4


@torch.no_grad()
def drift(student: nn.Module, steps: int) -> Iterator[int]:
    """Weights and statistics that shrink, and counters that count."""
    for step in range(steps):
        for value in student.state_dict().values():
            value.mul_(0.98) if value.is_floating_point() else value.add_(1)
        yield step


@pytest.mark.parametrize("kind", ["averaged", "copied", "batch"])
def test_updates_keep_every_tensor_where_it_is(kind: Any) -> None:
    student = net()
    teacher = EMANTeacher(student, statistics=kind)
    places = {name: value.data_ptr() for name, value in teacher.model.state_dict().items()}
    assert not set(places.values()) & {value.data_ptr() for value in student.state_dict().values()}
    objects = [id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())]
    for _ in train(student, 2):
        teacher.update()
    assert {name: value.data_ptr() for name, value in teacher.model.state_dict().items()} == places
    assert [id(tensor) for tensor in (*teacher.parameters(), *teacher.buffers())] == objects


@pytest.mark.parametrize("schedule", [PLAIN, COSINE])
def test_a_run_taken_up_from_a_checkpoint_goes_on_as_if_it_had_not_stopped(schedule: MomentumSchedule) -> None:
    def owner() -> nn.ModuleDict:
        student = net()
        teacher = EMANTeacher(student, schedule)
        teacher.total_updates = 6
        return nn.ModuleDict({"student": student, "teacher": teacher})

    def go(one: Any, steps: int, first: int = 0) -> None:
        for _ in train(one["student"], steps, first):
            one["teacher"].update()

    whole, half, rest = owner(), owner(), owner()
    go(whole, 6)
    go(half, 3)
    rest.load_state_dict(pickle.loads(pickle.dumps(half.state_dict())))
    assert rest["teacher"].updates == 3
    go(rest, 3, first=3)
    assert rest["teacher"].updates == 6
    assert same(state(rest["teacher"].model), state(whole["teacher"].model))


class Accumulating(Averaging):
    def __init__(self) -> None:
        LightningModule.__init__(self)
        self.student = net()
        self.teacher = EMANTeacher(self.student, 0.9)

    def training_step(self, batch: Tensor) -> Tensor:
        return self.student(batch).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD([p for p in self.parameters() if p.requires_grad], lr=0.1)

    def train_dataloader(self) -> DataLoader[Tensor]:
        return DataLoader([draw(seed).float() for seed in range(7)], batch_size=None)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Has no backbone to tell of."""


def test_accumulated_batches_count_as_the_one_step_that_they_make(tmp_path: Any) -> None:
    method = Accumulating()
    Trainer(
        accelerator="cpu", max_epochs=1, accumulate_grad_batches=3, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    ).fit(method)  # fmt: skip
    assert method.trainer.global_step == method.teacher.updates == 3
    assert method.teacher.model[1].num_batches_tracked == 7
