import pytest
import torch
from timm.layers import Linear
from torch import Tensor, nn

from linear.nets import build_net
from linear.test_assemble import ODD
from lqf_lightning.linear.kernel_layers import KernelLayer
from lqf_lightning.linear.kernel_plan import KernelPlan, plan_kernel, split_into_passes
from lqf_lightning.linear.reducer import Reducer

# Parameters that have to be differentiated sample by sample; everything else must be recognized.
REST: dict[str, set[str]] = {
    "attention of torch": {
        "position", "scale", "attend.in_proj_weight", "attend.in_proj_bias", "attend.out_proj.weight",
        "attend.out_proj.bias",
    },
    "used twice": set(),
    "windows": {"mixed.weight", "mixed.bias", "table.weight", "table.bias"},
    "stubborn": {"scale", "out.weight", "out.bias"},
    "normalizations of timm": set(),
}  # fmt: skip


def plan(net: nn.Module, x: Tensor) -> KernelPlan:
    torch.manual_seed(0)
    net = net.double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    state = {name: tensor.detach() for name, tensor in state.items()}
    return plan_kernel(net, state, {name: [name] for name, _ in net.named_parameters()}, x[:2], Reducer())


@pytest.mark.parametrize("kind", list(REST))
def test_structure_is_recognized_where_it_holds(kind: str, x: Tensor) -> None:
    found = plan(ODD[kind](), x)
    assert {name for layer in found.layers if layer.kind == "rest" for name in layer.parameters} == REST[kind]
    assert found.batched == (kind != "stubborn")
    assert not any(name.startswith(("unused", "aside")) for layer in found.layers for name in layer.parameters)


def test_windows_and_calls_are_counted(x: Tensor) -> None:
    windows = {layer.weight: layer for layer in plan(ODD["windows"](), x).layers if layer.weight}
    conv, inner = windows["conv.weight"], windows["inner.weight"]
    assert (conv.windows, conv.inputs, conv.positions) == (4, (3, 4, 4), 16)
    assert (inner.windows, inner.inputs, inner.positions) == (4, (16,), 4)
    assert {layer.calls for layer in plan(ODD["used twice"](), x).layers if layer.kind == "outer"} == {2}


def test_the_dense_layer_of_timm_is_one() -> None:
    found = plan(nn.Sequential(nn.Flatten(), Linear(12, 3)), torch.ones(2, 3, 2, 2, dtype=torch.float64))
    assert {layer.kind for layer in found.layers} == {"outer"}
    assert found.last == found.layers


def test_only_the_head_is_the_last_layer(x: Tensor) -> None:
    found = plan(build_net("residual"), x)
    assert {name for layer in found.last for name in layer.parameters} == {"6.weight", "6.bias"}
    scaled = nn.Sequential(nn.Flatten(), nn.Linear(192, 3), nn.Hardtanh(-1e9, 1e9), nn.LeakyReLU(0.5))
    assert plan(scaled, x).last == ()


def test_passes_keep_no_more_than_there_is_room_for() -> None:
    layers = [KernelLayer("g", str(size), "w", None, "rest", channels=size, stop=size) for size in (3, 4, 25, 2)]
    passes = split_into_passes(layers, 20, 2)
    assert [[(part.module, part.start, part.stop) for part in parts] for parts in passes] == [
        [("3", 0, 3), ("4", 0, 4)], [("25", 0, 10)], [("25", 10, 20)], [("25", 20, 25), ("2", 0, 2)],
    ]  # fmt: skip
