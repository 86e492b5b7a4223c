"""What only a GPU can show: devices, mixed precision, memory layout."""

import pandas as pd
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lqf_lightning.linear import LinearizedModel, fit_kfac, top_curvature
from lqf_lightning.teachers import EMANTeacher
from tiny import run_tiny

pytestmark = pytest.mark.gpu


def build():
    torch.manual_seed(0)
    layers = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(0.1), nn.Flatten(), nn.Linear(64, 3)
    return nn.Sequential(*layers).double().eval()


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_linear_model_and_curvature_equal_those_of_the_cpu(layout):
    x = torch.randn(5, 3, 6, 6, dtype=torch.float64)
    results = []
    for device in ("cpu", "cuda"):
        own = x.to(device, memory_format=layout)
        model = LinearizedModel(build().to(device), example=own)
        kfac = fit_kfac(model, None, [own], damping=0.1, cotangents="random")
        model(own).square().sum().backward()
        step = kfac.precondition({name: delta.grad for name, delta in model.deltas.items()})
        scale = top_curvature(model, [own], ridge=0.1, precondition=kfac.precondition)
        results.append((torch.cat([value.flatten() for value in step.values()]).cpu(), scale))
    (cpu_step, cpu_scale), (gpu_step, gpu_scale) = results
    assert torch.allclose(gpu_step, cpu_step, rtol=1e-8, atol=1e-10)
    assert gpu_scale == pytest.approx(cpu_scale, rel=1e-8)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
@pytest.mark.parametrize("method", ["finetune", "lqf", "lqf_adamw"])
def test_a_run_on_a_gpu_learns_the_tints(method, precision, tmp_path, folder_of_shapes):
    options = ["trainer=gpu", "trainer.max_epochs=10", f"trainer.precision={precision}", "method.optimizer.lr=0.1"]
    options = options[:-1] if method == "lqf_adamw" else options
    metrics = run_tiny(tmp_path, folder_of_shapes, f"method={method}", *options)
    assert metrics["train/acc"] > 0.5
    assert metrics["test/linear_probe_acc"] == 1.0


def averaged_pair(**options):
    torch.manual_seed(0)
    student = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(), nn.Linear(128, 3)).cuda()
    return student, EMANTeacher(student, 0.9, **options)


def average_on_a_gpu(student, teacher, precision=torch.float32, steps=5):
    """Trains the student; returns the weighted sum of its states, in double precision."""
    optimizer = torch.optim.SGD(student.parameters(), lr=0.1)
    floats = {name: value for name, value in student.state_dict().items() if value.is_floating_point()}
    expected = {name: value.double() for name, value in floats.items()}
    for step in range(steps):
        torch.manual_seed(step)
        with torch.autocast("cuda", dtype=precision, enabled=precision != torch.float32):
            loss = student.train()(torch.randn(16, 3, 6, 6, device="cuda")).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update()
        expected = {name: 0.9 * old + 0.1 * floats[name].double() for name, old in expected.items()}
    return expected


@pytest.mark.parametrize("precision", [torch.float32, torch.float16, torch.bfloat16])
def test_an_averaged_teacher_on_a_gpu_is_the_weighted_sum_of_all_students(precision):
    student, teacher = averaged_pair()
    expected = average_on_a_gpu(student, teacher, precision)
    own = teacher.model.state_dict()
    for name, value in expected.items():
        torch.testing.assert_close(own[name].double(), value, rtol=2e-6, atol=2e-6, msg=name)
    assert {value.device.type for value in own.values()} == {"cuda"}
    assert own["1.num_batches_tracked"] == 5
    with torch.autocast("cuda", dtype=precision, enabled=precision != torch.float32):
        answer = teacher(torch.randn(4, 3, 6, 6, device="cuda"))
    assert answer.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_an_averaged_teacher_of_a_half_precision_student_stays_in_single(dtype):
    student, teacher = averaged_pair()
    owner = nn.ModuleList([student, teacher]).to(dtype)
    images = torch.randn(4, 3, 6, 6, device="cuda", dtype=dtype)
    assert {p.dtype for p in owner[0].parameters()} == {dtype}
    assert {p.dtype for p in owner[1].parameters()} == {torch.float32}
    teacher.update()
    torch.testing.assert_close(teacher(images), student.eval()(images).float(), rtol=0.05, atol=0.05)


@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
@pytest.mark.parametrize("statistics", ["averaged", "copied", "batch"])
def test_an_update_of_an_averaged_teacher_never_waits_for_the_gpu(statistics):
    _, teacher = averaged_pair(statistics=statistics)
    torch.cuda.set_sync_debug_mode("error")
    try:
        teacher.update()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.fixture
def group_of_one(tmp_path):
    dist.init_process_group("nccl", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_student_with_synchronized_batch_norm_is_averaged_as_one_without(group_of_one):
    results = []
    for convert in (lambda model: model, nn.SyncBatchNorm.convert_sync_batchnorm):
        student, _ = averaged_pair()
        student = convert(student)
        teacher = EMANTeacher(student, 0.9)
        average_on_a_gpu(student, teacher)
        results.append((type(teacher.model[1]), teacher.model.state_dict()))
    (plain, first), (synchronized, second) = results
    assert (plain, synchronized) == (nn.BatchNorm2d, nn.SyncBatchNorm)
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_a_teacher_converted_with_its_owner_still_normalizes_by_what_it_has_averaged(group_of_one):
    student, teacher = averaged_pair()
    owner = nn.SyncBatchNorm.convert_sync_batchnorm(nn.ModuleList([student, teacher])).train()
    average_on_a_gpu(owner[0], owner[1])
    images, before = torch.randn(4, 3, 6, 6, device="cuda"), owner[1].model[1].running_mean.clone()
    assert isinstance(owner[1].model[1], nn.SyncBatchNorm)
    torch.testing.assert_close(owner[1](images[:1]), owner[1](images)[:1], rtol=1e-4, atol=1e-5)
    assert torch.equal(owner[1].model[1].running_mean, before)


def test_samples_are_scored_under_ddp_with_nccl_as_on_the_cpu(tmp_path, folder_of_shapes):
    options = [
        "method=lqf_sgd",
        "method.solver=kernel",
        "method.ridge=0.1",
        "callbacks=[sample_information]",
        "test=false",
    ]
    nccl = [
        "trainer=ddp",
        "trainer.accelerator=gpu",
        "trainer.devices=1",
        "+trainer.strategy.process_group_backend=nccl",
    ]
    tables = []
    for name, more in (("cpu", []), ("gpu", nccl)):
        run_tiny(tmp_path / name, folder_of_shapes, *options, "trainer.max_epochs=1", *more)
        tables.append(pd.read_parquet(tmp_path / name / "sample_information.parquet"))
    one, other = tables
    assert one["index"].tolist() == other["index"].tolist()
    for column in ("suspicion", "residual", "weight_information", "function_information"):
        assert other[column].to_numpy() == pytest.approx(one[column].to_numpy(), rel=1e-2), column
