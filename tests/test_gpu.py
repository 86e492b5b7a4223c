"""What only a GPU can show: devices, mixed precision, memory layout."""

import pytest
import torch
from torch import nn

from lqf_lightning.linear import LinearizedModel, fit_kfac, top_curvature
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
