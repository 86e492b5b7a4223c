import copy
import math
from collections.abc import Callable, Iterable
from typing import Any

import pytest
import torch
from timm.layers import BatchNormAct2d, GroupNormAct, LayerNorm2d
from torch import Tensor, nn

from linear.nets import build_net, dense_jacobian
from lqf_lightning.linear.assemble import KernelPair, assemble_kernel
from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.linear.linearized import LinearizedModel

EXACT = 1e-10  # relative, float64
Groups = dict[str, list[str]]


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * want.norm())


def by_child(net: nn.Module) -> Groups:
    groups: Groups = {}
    for name, _ in net.named_parameters():
        groups.setdefault(name.split(".")[0], []).append(name)
    return groups


def brute_force(net: nn.Module, rows: Tensor, columns: Tensor, names: Iterable[str], form: KernelForm) -> Tensor:
    """(blocks, m k, n k) from dense Jacobians."""
    left, right = dense_jacobian(net, rows), dense_jacobian(net, columns)
    blocks = sum(torch.einsum("icp,jdp->icjd", left[n].flatten(2), right[n].flatten(2)) for n in names)
    assert isinstance(blocks, Tensor)
    if form == "full":
        return blocks.flatten(2).flatten(0, 1).unsqueeze(0)
    diagonal = blocks.diagonal(dim1=1, dim2=3).permute(2, 0, 1)
    return diagonal if form == "diagonal" else diagonal.mean(0, keepdim=True)


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assemble(net: nn.Module, x: Tensor, groups: Groups | None = None, **options: Any) -> KernelPair:
    model = LinearizedModel(copy.deepcopy(net), example=x)
    return assemble_kernel(model, groups or by_child(net), list(x.split(2)), **options)


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("budget", [2**31, 20_000])
def test_kernels_are_the_products_of_dense_jacobians(net: nn.Module, x: Tensor, form: KernelForm, budget: int) -> None:
    y, groups = draw(3, 3, 8, 8), by_child(net)
    pair = assemble(net, x, groups, other=[y], form=form, budget=budget)
    assert pair.cross is not None
    for group, names in groups.items():
        assert close(pair.train.groups[group], brute_force(net, x, x, names, form)), group
        assert close(pair.cross.groups[group], brute_force(net, y, x, names, form)), group
        assert torch.equal(pair.train.groups[group], pair.train.groups[group].mT)
    total = pair.train.total()
    assert close(total, brute_force(net, x, x, [n for names in groups.values() for n in names], form))
    assert torch.linalg.eigvalsh(total).min() >= -1e-12 * total.norm()


def test_layers_share_several_passes_if_the_budget_is_small(net: nn.Module, x: Tensor) -> None:
    passes: list[int] = []

    def watch(items: Any) -> Any:
        passes.append(len(items))
        return iter(items)

    whole = assemble(net, x, watch=watch)
    once = len(passes)
    parts = assemble(net, x, budget=20_000, watch=watch)
    assert once == 2  # the batches, the layers
    assert len(passes) - once >= 4
    for group, want in whole.train.groups.items():
        assert close(parts.train.groups[group], want, 1e-12)


def test_frozen_parameters_are_left_out(x: Tensor) -> None:
    net = build_net("residual")
    groups = {"weight": ["3.conv2.weight"], "bias": ["3.conv2.bias", "3.bn2.bias"], "gain": ["3.bn2.weight"]}
    pair = assemble(net, x, groups)
    assert list(pair.train.groups) == ["weight", "bias", "gain"]
    for group, names in groups.items():
        assert close(pair.train.groups[group], brute_force(net, x, x, names, "full"))


class Attention(nn.Module):
    """Parameters that no module of their own multiplies, sequences first, and a position that is added."""

    def __init__(self, batch_first: bool) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.position = nn.Parameter(torch.randn(1, 4, 6))
        self.attend = nn.MultiheadAttention(6, 2, batch_first=batch_first)
        self.norm, self.mix, self.scale = nn.LayerNorm(6), nn.Linear(6, 6), nn.Parameter(torch.rand(6))
        self.out = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x[:, 0].flatten(1)[:, :24].reshape(-1, 4, 6) + self.position
        x = x if self.batch_first else x.transpose(0, 1)
        x = x + self.attend(x, x, x, need_weights=False)[0]
        x = x + self.scale * self.mix(self.norm(x)).relu()
        return self.out(x.mean(1 if self.batch_first else 0))  # type: ignore[no-any-return]


class Twice(nn.Module):
    """One layer on two resolutions, one normalization too, and changes in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.last = nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm(self.conv(x))
        a += x
        b = self.norm(self.conv(a.relu_()[..., ::2, ::2]))
        b *= 2
        return self.last(self.last(b.mean((2, 3))).tanh())  # type: ignore[no-any-return]


class Windows(nn.Module):
    """Layers that see windows as samples, one that sees them in the wrong order, and one that sees none at all."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.inner = nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.Linear(16, 4)
        self.mixed, self.out = nn.Linear(4, 4), nn.Linear(4, 3)
        self.table = nn.Linear(2, 4)

    def forward(self, x: Tensor) -> Tensor:
        n = len(x)
        windows = x.unfold(2, 4, 4).unfold(3, 4, 4).permute(0, 2, 3, 1, 4, 5).reshape(-1, 3, 4, 4)
        hidden = self.inner(self.norm(self.conv(windows)).flatten(1)).reshape(n, 4, 4)
        other = self.mixed(hidden.transpose(0, 1).reshape(4 * n, 4).tanh()).reshape(4, n, 4).sum(0)
        bias = self.table(torch.linspace(-1, 1, 6, dtype=x.dtype).view(3, 2)).tanh().mean(0)
        return self.out(other + hidden.mean(1) * bias)  # type: ignore[no-any-return]


class Stubborn(nn.Module):
    """Cannot be vectorized over samples, and has a part that leads nowhere and a call by keyword."""

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.out = nn.Parameter(torch.rand(3)), nn.Linear(3, 3)
        self.unused, self.aside = nn.Linear(2, 2), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x.mean((2, 3)) * self.scale
        self.aside(x)
        if float(x.detach().square().sum()) < 0:
            raise ValueError("never")
        return self.out(input=x.tanh())  # type: ignore[no-any-return]


ODD: dict[str, Callable[[], nn.Module]] = {
    "attention of torch": lambda: Attention(True),
    "sequences first": lambda: Attention(False),
    "used twice": Twice,
    "windows": Windows,
    "stubborn": Stubborn,
    "normalizations of timm": lambda: nn.Sequential(
        nn.Conv2d(3, 4, 3), BatchNormAct2d(4), nn.Conv2d(4, 4, 2), LayerNorm2d(4), nn.Conv2d(4, 4, 2),
        GroupNormAct(4, num_groups=2, drop_layer=None), nn.Conv2d(4, 3, 4), nn.Flatten(),
    ),
    "encoder of torch": lambda: nn.Sequential(
        nn.Flatten(2), nn.Linear(64, 6), nn.TransformerEncoderLayer(6, 2, 5, batch_first=True), nn.Flatten(),
        nn.Linear(18, 3),
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", list(ODD))
@pytest.mark.parametrize("budget", [2**31, 12_000])
def test_odd_networks_are_exact_too(kind: str, budget: int, x: Tensor) -> None:
    torch.manual_seed(0)
    net = ODD[kind]().double().eval()
    for parameter in net.parameters():
        nn.init.normal_(parameter, std=0.5)
    groups = {name: [name] for name, _ in net.named_parameters()}
    pair = assemble(net, x, groups, budget=budget)
    for name in groups:
        want = brute_force(net, x, x, [name], "full")
        assert (pair.train.groups[name] - want).norm() <= EXACT * want.norm() + 1e-14, name


def test_last_layer_needs_no_backward_pass(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net = build_net("transformer")
    y, groups = draw(2, 3, 8, 8), {"weight": ["head.weight"], "bias": ["head.bias"]}
    want = [brute_force(net, rows, x, ["head.weight", "head.bias"], "trace") for rows in (x, y)]
    pair = assemble(net, x, groups, other=[y], form="last_layer")
    assert pair.cross is not None
    assert close(pair.train.total(), want[0])
    assert close(pair.cross.total(), want[1])
    assert close(pair.train.groups["bias"], torch.ones(1, 5, 5, dtype=torch.float64))
    full = assemble(net, x, groups).train.total()
    assert close(full[0], torch.kron(pair.train.total()[0], torch.eye(3, dtype=torch.float64)))
    with pytest.raises(ValueError, match=r"holds? the last linear layer.*got norm\.weight"):
        assemble(net, x, {"all": ["head.weight", "norm.weight"]}, form="last_layer")
    with pytest.raises(ValueError, match="last linear layer"):
        assemble(net, x, {"all": ["blocks.0.mlp.fc1.weight"]}, form="last_layer")


def test_random_combinations_are_unbiased_for_the_trace(x: Tensor) -> None:
    net, draws = build_net("residual"), 100
    exact = assemble(net, x, form="trace").train.total()
    values = torch.stack([
        assemble(net, x, form="trace", combinations=1, seed=seed).train.total() for seed in range(draws)
    ])
    # The squared error of a mean is expected to be the variance over the number of draws.
    spread = math.sqrt(float(values.var(0).sum()) / draws)
    assert (values.mean(0) - exact).norm() <= 3 * spread
    assert spread < 0.2 * exact.norm()
    many = assemble(net, x, form="trace", combinations=400).train.total()
    assert (many - exact).norm() <= 3 * spread * math.sqrt(draws / 400)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_networks_give_single_precision(dtype: torch.dtype, x: Tensor) -> None:
    net = build_net("residual", dtype)
    pair = assemble(net, x.to(dtype))
    assert {matrix.dtype for matrix in pair.train.groups.values()} == {torch.float32}
    want = assemble(copy.deepcopy(net).double(), x.to(dtype).double()).train.total()
    assert close(pair.train.total(), want, 1e-5)


def test_samples_are_ordered_by_index_and_count_once(x: Tensor) -> None:
    net, index = build_net("depthwise"), torch.tensor([4, 1, 4, 7, 0])
    twice = torch.stack([x[0], x[1], x[0], x[3], x[4]])
    pair = assemble(net, twice, index=index, other=[x[:2], x[2:]], other_index=torch.tensor([9, 8, 7, 6, 5]))
    assert pair.cross is not None
    order = [4, 1, 0, 3]
    assert pair.index.tolist() == [0, 1, 4, 7]
    assert pair.other_index.tolist() == [5, 6, 7, 8, 9]
    names = [name for name, _ in net.named_parameters()]
    assert close(pair.train.total(), brute_force(net, x[order], x[order], names, "full"))
    assert close(pair.cross.total(), brute_force(net, x.flip(0), x[order], names, "full"))


class StopError(Exception):
    pass


def test_finished_groups_are_not_computed_again(x: Tensor) -> None:
    net, y = build_net("residual"), draw(2, 3, 8, 8)
    want, store, layers = assemble(net, x, other=[y]), {}, 0
    last = list(by_child(net))[-1]

    def stop(items: Any) -> Any:
        for item in items:
            if getattr(item, "group", None) == last:
                raise StopError
            yield item

    def count(items: Any) -> Any:
        nonlocal layers
        layers += sum(hasattr(item, "group") for item in items)
        return iter(items)

    with pytest.raises(StopError):
        assemble(net, x, other=[y], store=store, watch=stop)
    assert 0 < len(store) == 2 * (len(by_child(net)) - 1)
    got = assemble(net, x, other=[y], store=store, watch=count)
    assert layers == 1
    assert got.cross is not None
    assert want.cross is not None
    for group, matrix in want.train.groups.items():
        assert torch.equal(got.train.groups[group], matrix)
        assert torch.equal(got.cross.groups[group], want.cross.groups[group])


def test_a_store_of_another_kernel_is_refused(x: Tensor) -> None:
    net, store = build_net("residual"), {}
    assemble(net, x, store=store)
    other = build_net("residual")
    with torch.no_grad():
        next(other.parameters())[0, 0, 0, 0] += 1e-6
    swapped = x.clone()
    swapped[0, 0, 0, :2] = x[0, 0, 0, :2].flip(0)
    for call in (
        lambda: assemble(net, x, store=store, form="trace"),
        lambda: assemble(net, x[:4], store=store),
        lambda: assemble(net, swapped, store=store),
        lambda: assemble(net, x, index=torch.tensor([1, 0, 2, 3, 4]), store=store),
        lambda: assemble(other, x, store=store),
        lambda: assemble(net, x, {"0": ["0.weight"], "6": ["6.bias"]}, store=store),
    ):
        with pytest.raises(ValueError, match=r"another kernel.*Give an empty store"):
            call()


def test_the_network_is_left_as_it_was(x: Tensor) -> None:
    net = build_net("residual").requires_grad_(False)
    model = LinearizedModel(net, example=x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        batches = [x[:3].clone(), x[3:].clone()]
        inside = assemble_kernel(model, by_child(net), batches).train.total()
    assert close(inside, assemble(net, x).train.total())
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_bad_arguments_are_explained(x: Tensor) -> None:
    net = build_net("residual")
    with pytest.raises(ValueError, match=r"'4\.weight' is no linearized parameter"):
        assemble(net, x, {"all": ["4.weight"]})
    with pytest.raises(ValueError, match=r"'6\.bias' stands there twice"):
        assemble(net, x, {"all": ["6.weight", "6.bias"], "more": ["6.bias"]})
    with pytest.raises(ValueError, match=r"without a list of names: \['none'\]"):
        assemble(net, x, {"all": ["6.weight"], "none": []})
    with pytest.raises(ValueError, match="form is 'half'"):
        assemble(net, x, form="half")
    with pytest.raises(ValueError, match="combinations=2 with form='full'"):
        assemble(net, x, combinations=2)
    with pytest.raises(ValueError, match=r"15 rows.*GiB.*limit is 14 rows.*form='trace'.*'cg'"):
        assemble(net, x, limit=14)
    assert assemble(net, x, form="trace", limit=5).train.total().shape == (1, 5, 5)
    with pytest.raises(ValueError, match="Raise the budget"):
        assemble(net, x, budget=1000)
    with pytest.raises(ValueError, match=r"one whole number per sample \(5,\)"):
        assemble(net, x, index=torch.arange(4))
    model = LinearizedModel(net, example=x)
    with pytest.raises(ValueError, match="no training sample"):
        assemble_kernel(model, by_child(net), [])
    with pytest.raises(TypeError, match="generator, which is spent"):
        assemble_kernel(model, by_child(net), (part for part in x.split(2)))
    with pytest.raises(ValueError, match="all samples must have the same size"):
        assemble_kernel(model, {"all": ["0.weight"]}, [x, x[..., :6]])
