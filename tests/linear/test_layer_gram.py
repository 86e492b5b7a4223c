from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from timm.layers import create_conv2d
from torch import Tensor, nn

from linear.nets import dense_jacobian
from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.linear.kernel_layers import KernelLayer, list_candidates
from lqf_lightning.linear.layer_gram import LayerGram
from lqf_lightning.linear.layer_records import LayerRecorder, Record

EXACT = 1e-12  # relative, float64: sums of a few thousand products

FORMS: list[KernelForm] = ["full", "diagonal", "trace"]
LAYERS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "dense": (lambda: nn.Linear(5, 4), (5,)),
    "tokens": (lambda: nn.Linear(5, 4), (3, 2, 5)),
    "no bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "plain": (lambda: nn.Conv2d(2, 4, 3), (2, 5, 6)),
    "strided": (lambda: nn.Conv2d(2, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (2, 6, 5)),
    "circular": (lambda: nn.Conv2d(2, 4, 3, padding=1, padding_mode="circular", bias=False), (2, 4, 4)),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, dilation=2, padding=2), (6, 4, 4)),
    "depthwise": (lambda: nn.Conv2d(3, 3, 3, groups=3, padding="same"), (3, 4, 4)),
    "as TensorFlow pads": (lambda: create_conv2d(2, 4, 3, stride=2, padding="same"), (2, 4, 6)),
}


def build(kind: str) -> tuple[nn.Sequential, Tensor]:
    torch.manual_seed(0)
    make, shape = LAYERS[kind]
    layer, x = make(), torch.randn(7, *shape, dtype=torch.float64)
    hidden = layer.double()(x[:1]).numel()
    return nn.Sequential(layer, nn.Tanh(), nn.Flatten(), nn.Linear(hidden, 3)).double().requires_grad_(False), x


def brute_force(net: nn.Module, x: Tensor, names: list[str], form: KernelForm) -> Tensor:
    """(blocks, n k, n k) from the dense Jacobian."""
    jacobian = dense_jacobian(net, x)
    rows = torch.cat([jacobian[name].flatten(2) for name in names], 2)
    if form == "full":
        return (rows.flatten(0, 1) @ rows.flatten(0, 1).T).unsqueeze(0)
    blocks = rows.transpose(0, 1) @ rows.transpose(0, 1).mT
    return blocks if form == "diagonal" else blocks.mean(0, keepdim=True)


def record(net: nn.Module, layer: KernelLayer, x: Tensor, state: dict[str, Tensor] | None = None) -> Record:
    state = state or dict(net.named_parameters())
    found = Record.empty(layer, len(x), 3, x)
    directions = torch.eye(3, dtype=x.dtype).unsqueeze(1)
    with LayerRecorder(net, state, [layer]) as recorder:
        for start in range(0, len(x), 3):
            part = x[start : start + 3]
            recorder.record(part, directions.expand(-1, len(part), -1), {layer: found}, start)
    return found


def measure(net: nn.Module, x: Tensor, groups: dict[str, list[str]]) -> KernelLayer:
    """The first layer with the sizes that its input gives it."""
    (layer,) = list_candidates(net, groups)
    positions = net[0](x[:1]).numel() // layer.channels  # type: ignore[index]
    return replace(layer, inputs=tuple(x.shape[1:]) if layer.weight else (0,), positions=positions)


def upper(kernel: Tensor) -> Tensor:
    return kernel.triu() + kernel.triu(1).mT


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("scratch", [2**26, 200])
@pytest.mark.parametrize("how", ["rows", "explicit", "ghost"])
@pytest.mark.parametrize("kind", list(LAYERS))
def test_every_way_gives_the_products_of_the_gradients(kind: str, how: str, scratch: int, form: KernelForm) -> None:
    net, x = build(kind)
    names = [name for name, _ in net[0].named_parameters(prefix="0")]
    layer = measure(net, x, {"all": names})
    if how == "ghost" and layer.blocks > 1:
        pytest.skip("groups of a convolution are never contracted so")
    layer = replace(layer, rows=how == "rows", gram="ghost" if how == "ghost" else "explicit")
    noted, want = record(net, layer, x), brute_force(net, x, names, form)
    gram, got = LayerGram(layer, net[0], form, scratch), torch.zeros_like(want)
    gram.add_to(got, noted)
    assert (upper(got) - want).norm() <= EXACT * want.norm()
    k = want.shape[1] // 7
    left, right = (Record(noted.inputs[part], noted.deltas[part]) for part in (slice(0, 3), slice(3, 7)))
    cross = torch.zeros_like(want[:, : 3 * k, 3 * k :])
    gram.add_to(cross, left, right)
    assert (cross - want[:, : 3 * k, 3 * k :]).norm() <= EXACT * want.norm()


@pytest.mark.parametrize("how", ["rows", "explicit", "ghost"])
@pytest.mark.parametrize("kind", ["tokens", "plain", "grouped", "depthwise"])
def test_parts_of_a_layer_add_up(kind: str, how: str) -> None:
    net, x = build(kind)
    layer = measure(net, x, {"all": ["0.weight", "0.bias"]})
    if how == "ghost" and layer.blocks > 1:
        pytest.skip("groups of a convolution are never contracted so")
    layer = replace(layer, rows=how == "rows", gram="ghost" if how == "ghost" else "explicit")
    fixed = 0 if layer.rows else layer.input_numbers
    parts = layer.split(fixed + (layer.numbers(3) - fixed) // 2, 3)
    assert len(parts) >= 2
    assert [part.start for part in parts[1:]] == [part.stop for part in parts[:-1]]
    want = brute_force(net, x, ["0.weight", "0.bias"], "full")
    got = torch.zeros_like(want)
    for part in parts:
        LayerGram(part, net[0], "full").add_to(got, record(net, part, x))
    assert (upper(got) - want).norm() <= EXACT * want.norm()


@pytest.mark.parametrize("kind", ["dense", "tokens", "plain", "depthwise"])
@pytest.mark.parametrize("name", ["weight", "bias"])
def test_weight_and_bias_may_go_apart(kind: str, name: str) -> None:
    net, x = build(kind)
    layer = measure(net, x, {"one": [f"0.{name}"]})
    want = brute_force(net, x, [f"0.{name}"], "full")
    for how in (replace(layer, rows=True), replace(layer, rows=False)):
        got = torch.zeros_like(want)
        LayerGram(how, net[0], "full").add_to(got, record(net, how, x))
        assert (upper(got) - want).norm() <= EXACT * want.norm()


def test_the_cheaper_way_is_taken() -> None:
    sizes: dict[str, Any] = {"windows": 1, "kind": "outer"}
    # The layers of a ResNet-18 at 64 pixels, with ten outputs.
    first = KernelLayer(
        "g", "m", "w", None, **sizes, inputs=(64, 16, 16), positions=256, width=576, channels=64, stop=64
    )
    last = KernelLayer(
        "g", "m", "w", None, **sizes, inputs=(512, 2, 2), positions=4, width=4608, channels=512, stop=512
    )
    stem = KernelLayer(
        "g", "m", "w", None, **sizes, inputs=(3, 64, 64), positions=1024, width=147, channels=64, stop=64
    )
    head = KernelLayer("g", "m", "w", None, **sizes, inputs=(512,), positions=1, width=513, channels=10, stop=10)
    chosen = [layer.choose("full", 10, 1000) for layer in (first, last, stem, head)]
    assert [layer.gram for layer in chosen] == ["explicit", "ghost", "explicit", "ghost"]
    assert [layer.rows for layer in chosen] == [False, False, True, False]
    # One output alone makes explicit rows a hundred times cheaper, and ghost products hardly so.
    assert last.choose("full", 1, 1000).gram == "ghost"
    assert replace(last, positions=64, inputs=(512, 8, 8)).choose("full", 1, 1000).gram == "explicit"


def test_a_channel_beyond_the_budget_is_refused() -> None:
    net, x = build("plain")
    with pytest.raises(ValueError, match=r"'0\.weight' needs 57 numbers per sample.*room for 10"):
        measure(net, x, {"all": ["0.weight", "0.bias"]}).split(10, 3)


def test_parts_of_a_normalization_add_up() -> None:
    torch.manual_seed(0)
    net = (
        nn
        .Sequential(nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(16, 3))
        .double()
        .eval()
        .requires_grad_(False)
    )
    x = torch.randn(7, 4, 2, 2, dtype=torch.float64)
    (layer,) = list_candidates(net, {"all": ["0.weight", "0.bias"]})
    want = brute_force(net, x, ["0.weight", "0.bias"], "full")
    got = torch.zeros_like(want)
    state = {**dict(net.named_parameters()), **dict(net.named_buffers())}
    for part in layer.split(9, 3):
        assert part.stop - part.start <= 3
        LayerGram(part, None, "full").add_to(got, record(net, part, x, state))
    assert (upper(got) - want).norm() <= EXACT * want.norm()


def test_outputs_that_do_not_depend_on_a_layer_count_as_zero() -> None:
    class Apart(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(nn.Linear(4, 1) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return torch.cat([layer(x[:, 0]).tanh() for layer in self.layers], 1)

    torch.manual_seed(0)
    net, x = Apart().double().requires_grad_(False), torch.randn(7, 1, 4, dtype=torch.float64)
    for layer in list_candidates(net, {"all": [name for name, _ in net.named_parameters()]}):
        want = brute_force(net, x, list(layer.parameters), "full")
        for how in (replace(layer, rows=True), replace(layer, rows=False, inputs=(4,))):
            got = torch.zeros_like(want)
            LayerGram(how, net.get_submodule(layer.module), "full").add_to(got, record(net, how, x))
            assert (upper(got) - want).norm() <= EXACT * want.norm()
