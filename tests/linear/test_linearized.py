import copy
import io
from collections.abc import Iterable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from linear.nets import PreActivated, build_net, dense_jacobian, head, push, random_direction
from lqf_lightning.linear import LinearizedModel
from lqf_lightning.linear.attention import math_attention
from ranks import run_on_ranks

EXACT = 1e-12  # relative, float64: a few thousand roundings of 1e-16


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return bool((got - want).norm() <= tolerance * want.norm())


def move(linear: LinearizedModel, direction: dict[str, Tensor]) -> LinearizedModel:
    with torch.no_grad():
        for name, delta in linear.deltas.items():
            delta.copy_(direction[name])
    return linear


def gradient(linear: nn.Module, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    linear.zero_grad()
    (linear(x) * cotangent).sum().backward()
    return {name: p.grad for name, p in linear.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
@pytest.mark.parametrize("refold", [True, False])
def test_output_is_the_first_order_expansion(net: nn.Module, x: Tensor, mode: Any, refold: bool) -> None:
    direction, value = random_direction(net), copy.deepcopy(net)(x).detach()
    expected = value + push(dense_jacobian(net, x), direction)
    linear = move(LinearizedModel(net, example=x, mode=mode, refold=refold), direction)
    assert (linear.mode, linear.notes) == (mode, ())
    assert close(linear(x), expected)
    with torch.no_grad():
        assert close(linear(x), expected)


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
def test_gradient_is_the_transposed_jacobian(net: nn.Module, x: Tensor, mode: Any) -> None:
    jacobian, cotangent = dense_jacobian(net, x), torch.randn(5, 3, dtype=torch.float64)
    linear = move(LinearizedModel(net, example=x, mode=mode), random_direction(net))
    got = gradient(linear, x, cotangent)
    for name, rows in jacobian.items():
        expected = torch.einsum("bc,bc...->...", cotangent, rows)
        # Some are zero but for rounding (a key bias under softmax), so the size of all of them is the scale.
        assert (got[f"dw.{name}"] - expected).norm() <= EXACT * (expected.norm() + 10)


def test_adjoint_identity(net: nn.Module, x: Tensor) -> None:
    linear = move(LinearizedModel(net, example=x), random_direction(net))
    cotangent = torch.randn(5, 3, dtype=torch.float64)
    at_zero = linear.model(x)
    across = (cotangent * (linear(x) - at_zero)).sum()
    back = sum((g * random_direction(net)[n[3:]]).sum() for n, g in gradient(linear, x, cotangent).items())
    assert abs(across - back) <= EXACT * cotangent.norm() * (linear(x) - at_zero).norm()


def test_without_movement_the_network_itself(net: nn.Module, x: Tensor) -> None:
    plain = copy.deepcopy(net)
    unfolded = LinearizedModel(copy.deepcopy(net), example=x, refold=False, mode="vjp")
    folded = LinearizedModel(net, example=x)
    assert torch.equal(unfolded(x), plain(x))
    with math_attention():
        assert torch.equal(folded(x), folded._current(x).value(x))
    assert close(folded(x), plain(x))


def test_output_is_affine_in_the_movement(net: nn.Module, x: Tensor) -> None:
    linear = LinearizedModel(net, example=x)
    a, b = random_direction(net, 3), random_direction(net, 4)
    zero = linear(x).detach()
    parts = [move(linear, d)(x).detach() - zero for d in (a, b)]
    both = move(linear, {n: 2 * a[n] - 3 * b[n] for n in a})(x).detach() - zero
    assert close(both, 2 * parts[0] - 3 * parts[1])


def test_a_linear_network_is_its_own_expansion() -> None:
    net = nn.Linear(4, 2).double()
    x = torch.randn(6, 4, dtype=torch.float64)
    linear = move(LinearizedModel(copy.deepcopy(net), example=x), random_direction(net))
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            parameter += random_direction(net)[name]
    assert close(linear(x), net(x))


def test_predictions_do_not_depend_on_the_batch_and_statistics_stay(x: Tensor) -> None:
    net = build_net("residual")
    before = copy.deepcopy(dict(net.named_buffers()))
    linear = move(LinearizedModel(net, example=x), random_direction(net)).train()
    assert linear.training
    assert not any(module.training for module in linear.model.modules())
    order = torch.tensor([3, 0, 4])
    assert close(linear(x[order]), linear(x)[order])
    linear(x).sum().backward()
    assert all(torch.equal(before[name], buffer) for name, buffer in linear.model.named_buffers())


def test_training_a_part_equals_zero_movement_elsewhere(net: nn.Module, x: Tensor) -> None:
    names = [name for name, _ in net.named_parameters()]
    chosen = names[1::3]
    direction = {n: d if n in chosen else torch.zeros_like(d) for n, d in random_direction(net).items()}
    whole = move(LinearizedModel(copy.deepcopy(net), example=x), direction)
    part = move(LinearizedModel(net, reversed(chosen), example=x), direction)
    assert list(part.deltas) == chosen
    assert close(part(x), whole(x))
    cotangent = torch.randn(5, 3, dtype=torch.float64)
    expected = gradient(whole, x, cotangent)
    for name, got in gradient(part, x, cotangent).items():
        assert (got - expected[name]).norm() <= EXACT * (expected[name].norm() + 10)


def test_every_subset_of_a_folded_pair(x: Tensor) -> None:
    pair = ["3.conv2.weight", "3.conv2.bias", "3.bn2.weight", "3.bn2.bias"]
    net = build_net("residual")
    jacobian, direction, value = dense_jacobian(net, x), random_direction(net), net(x).detach()
    for subset in range(1, 16):
        names = [name for bit, name in enumerate(pair) if subset >> bit & 1]
        linear = move(LinearizedModel(copy.deepcopy(net), names, example=x), direction)
        assert linear.notes == ()  # the full fold is right, not a fallback
        assert close(linear(x), value + push(jacobian, {n: direction[n] for n in names})), names
        assert linear._current(x).tangents(linear.deltas).keys() <= {"3.conv2.weight", "3.conv2.bias"}


def test_only_trained_layers_carry_tangents(x: Tensor) -> None:
    net = build_net("residual")
    linear = LinearizedModel(net, [n for n, _ in net.named_parameters() if n.startswith("6.")], example=x)
    assert set(linear._current(x).tangents(linear.deltas)) == {"6.weight", "6.bias"}


def test_folding_finds_pairs_lone_normalizations_and_safe_activations(x: Tensor) -> None:
    plan = LinearizedModel(build_net("residual"), example=x)._current(x).plan
    assert plan.pairs == (("0", "1"), ("3.conv1", "3.bn1"), ("3.conv2", "3.bn2"))
    # Activation 2 is read by the residual block and by its shortcut, but it is its own input that is overwritten.
    assert plan.in_place == ("2", "3.act")
    plan = LinearizedModel(build_net("depthwise"), example=x)._current(x).plan
    assert plan.pairs == (("0", "1"), ("4.depthwise", "4.bn1"))
    assert plan.affine == ("4.bn0",)


def test_shortcuts_around_a_normalization_or_an_activation_are_seen(x: Tensor) -> None:
    class Forked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.act, self.side = nn.Conv2d(6, 6, 1), nn.LeakyReLU(0.1), nn.Conv2d(6, 6, 1)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.act(y) + self.side(y)  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 6, 3), PreActivated(6), Forked(), *head(6)).double().eval()
    linear = LinearizedModel(net, example=x)
    plan = linear._current(x).plan
    assert linear.notes == ()  # seen beforehand, not found out by comparison
    assert (plan.pairs, plan.affine, plan.in_place) == ((("1.depthwise", "1.bn1"),), ("1.bn0",), ("1.act",))


def test_folding_is_refused_where_it_would_change_the_function(x: Tensor) -> None:
    class Around(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn, self.head = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.conv(x)
            return self.head((self.bn(y) + y.tanh()).mean((2, 3)))

    torch.manual_seed(0)
    net = Around().double().eval()
    nn.init.uniform_(net.bn.running_var, 0.5, 2.0)
    value = net(x).detach()
    linear = LinearizedModel(net, example=x)
    assert linear._current(x).plan.pairs == ()
    assert "1 pairs folded" in linear.notes[0]
    assert close(linear(x), value)


def test_the_caller_keeps_an_unfolded_network(x: Tensor) -> None:
    net = build_net("residual")
    keys = list(net.state_dict())
    linear = LinearizedModel(net, example=x)
    assert list(linear.model.state_dict()) == keys
    assert not linear.model[2].inplace
    wanted = {f"model.{k}" for k in keys} | {f"dw.{n}" for n, _ in net.named_parameters()}
    assert set(linear.state_dict()) == wanted


def test_a_changed_network_is_folded_anew(x: Tensor) -> None:
    net, other = build_net("residual"), build_net("residual")
    with torch.no_grad():
        for tensor in (*other.parameters(), *other.buffers()):
            if tensor.is_floating_point():
                tensor.mul_(1.25)
    linear = LinearizedModel(net, example=x)
    linear(x)
    linear.model.load_state_dict(other.state_dict())  # in place, without telling the LinearizedModel
    assert close(linear(x), other(x))
    linear = LinearizedModel(build_net("residual"), example=x)
    state = LinearizedModel(copy.deepcopy(other), example=x).state_dict()
    linear.load_state_dict(state, assign=True)
    assert close(linear(x), other(x))


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_double_precision_is_exact_after_conversion(kind: str, x: Tensor) -> None:
    net = build_net(kind, torch.float32)
    exact = copy.deepcopy(net).double()
    direction = random_direction(exact)
    expected = exact(x).detach() + push(dense_jacobian(exact, x), direction)
    linear = move(LinearizedModel(net, example=x.float()).double(), direction)
    assert linear(x).dtype == torch.float64
    assert close(linear(x), expected)


def test_checkpoint_survives_weights_only_loading(x: Tensor) -> None:
    net = build_net("depthwise")
    linear = move(LinearizedModel(net, example=x), random_direction(net))
    file = io.BytesIO()
    torch.save(linear.state_dict(), file)
    file.seek(0)
    fresh = build_net("depthwise")
    with torch.no_grad():
        for parameter in fresh.parameters():
            parameter.zero_().add_(0.1)
    other = LinearizedModel(fresh, example=x)
    other.load_state_dict(torch.load(file, weights_only=True))
    assert torch.equal(other(x), linear(x))


@pytest.mark.parametrize("started", [True, False])
def test_copies_and_pickles_are_independent(x: Tensor, started: bool) -> None:
    net = build_net("residual")
    linear = move(LinearizedModel(net, example=x if started else None), random_direction(net))
    file = io.BytesIO()
    torch.save(linear, file)
    file.seek(0)
    before = LinearizedModel.forward(copy.deepcopy(linear), x).detach()
    for other in (copy.deepcopy(linear), torch.load(file, weights_only=False)):
        assert torch.equal(other(x), before)
        with torch.no_grad():
            other.deltas["6.bias"] += 1
        assert close(other(x), before + 1)
    assert torch.equal(linear(x), before)


def test_inference_mode_keeps_the_tangent(net: nn.Module, x: Tensor) -> None:
    linear = move(LinearizedModel(net), random_direction(net))
    with torch.inference_mode():  # also the first call, where the probe runs
        got = linear(x.clone()).clone()
    assert close(linear(x), got)
    assert linear(x).requires_grad


def test_the_first_batch_starts_the_probe(x: Tensor) -> None:
    linear = LinearizedModel(build_net("residual"))
    assert linear.mode == "auto"
    linear(x)
    assert linear.mode == "jvp"


@pytest.mark.parametrize("kind", ["residual", "depthwise", "transformer"])
def test_bfloat16_autocast_runs_and_returns_single_precision(kind: str, x: Tensor) -> None:
    net, x = build_net(kind, torch.float32), x.float()
    linear = move(LinearizedModel(net, example=x), {n: 0.1 * d for n, d in random_direction(net).items()})
    exact = linear(x).detach()
    with torch.autocast("cpu", torch.bfloat16):
        got = linear(x)
    assert got.dtype == torch.float32
    got.sum().backward()
    assert all(delta.grad is not None and delta.grad.isfinite().all() for delta in linear.deltas.values())
    assert 0 < (got - exact).norm() < 0.1 * exact.norm()  # 8 bits of mantissa: rounding, and visibly so


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
def test_unreached_parameters_get_a_zero_gradient(mode: Any, x: Tensor) -> None:
    linear = LinearizedModel(_Use(build_net("residual"), nn.Linear(2, 2).double()), example=x, mode=mode)
    linear(x).sum().backward()
    grad = linear.deltas["spare.weight"].grad
    assert grad is not None
    assert not grad.count_nonzero()


class _Use(nn.Module):
    def __init__(self, used: nn.Module, spare: nn.Module) -> None:
        super().__init__()
        self.used, self.spare = used, spare

    def forward(self, x: Tensor) -> Any:
        return self.used(x)


def test_w0_never_requires_a_gradient(x: Tensor) -> None:
    linear = LinearizedModel(build_net("residual"), example=x)
    assert [n for n, p in linear.named_parameters() if p.requires_grad] == [f"dw.{n}" for n in linear.deltas]
    linear.model[6].weight.requires_grad_(True)
    with pytest.raises(RuntimeError, match="w0 stays frozen"):
        linear(x)


def test_a_zero_head_is_refused(net: nn.Module, x: Tensor) -> None:
    name, head = [(n, m) for n, m in net.named_modules() if isinstance(m, nn.Linear)][-1]
    nn.init.zeros_(head.weight)
    with pytest.raises(ValueError, match=rf"weight of '{name}' is all zero"):
        LinearizedModel(net, example=x)
    LinearizedModel(net, [f"{name}.weight", f"{name}.bias"], example=x)(x)  # a linear probe on purpose


def test_mode_falls_back_where_forward_mode_fails(x: Tensor) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Hardsigmoid(), nn.Flatten(), nn.Linear(144, 3)).double()
    direction, expected = random_direction(net), net(x).detach() + push(dense_jacobian(net, x), random_direction(net))
    linear = move(LinearizedModel(net, example=x), direction)
    assert linear.mode == "vjp"
    assert "hardsigmoid_backward" in linear.notes[0]
    assert close(linear(x), expected)
    with pytest.raises(RuntimeError, match="hardsigmoid_backward"):
        LinearizedModel(net, example=x, mode="jvp")


def test_mode_falls_back_where_forward_mode_gives_nan(x: Tensor) -> None:
    class Normalized(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = nn.Linear(192, 4, bias=False)
            self.outer = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            padded = torch.cat([self.inner(x.flatten(1)), self.inner(torch.zeros_like(x.flatten(1)))])
            return self.outer(nn.functional.normalize(padded)[: len(x)])

    net = Normalized().double()
    expected = dense_jacobian(net, x)
    linear = LinearizedModel(net, example=x)
    assert linear.mode == "vjp"
    assert "not finite" in linear.notes[0]
    got = gradient(linear, x, torch.ones(5, 3, dtype=torch.float64))
    assert close(got["dw.inner.weight"], expected["inner.weight"].sum((0, 1)))


def test_a_failing_module_is_named(x: Tensor) -> None:
    net = nn.Sequential(nn.Flatten(), nn.Linear(7, 3)).double()
    with pytest.raises(RuntimeError, match=r"the network itself fails in 1 \(Linear\)"):
        LinearizedModel(net, example=x)


def _parts(tied: nn.Module) -> Iterable[nn.Module]:
    return tied, nn.Sequential(tied)


def test_wrappers_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    for wrapper in (torch.compile(net), nn.DataParallel(net), LinearizedModel(copy.deepcopy(net))):
        for wrapped in _parts(wrapper):
            with pytest.raises(TypeError, match=f"{type(wrapper).__name__}.*Linearize the inner network"):
                LinearizedModel(wrapped)


def test_shared_parameters_are_refused_by_name() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    net[1].weight = net[0].weight
    with pytest.raises(ValueError, match=r"0\.weight and 1\.weight are one tensor.*deepcopy"):
        LinearizedModel(net)
    example = torch.randn(2, 3)
    assert list(LinearizedModel(net, ["2.weight"], example=example).deltas) == ["2.weight"]


def test_bad_arguments_are_explained() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    with pytest.raises(ValueError, match="normalizations 1 keep no running statistics"):
        LinearizedModel(net)
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match=r"no parameter '1\.wieght'; the nearest names are 1\.weight"):
        LinearizedModel(net, ["1.wieght"])
    with pytest.raises(TypeError, match="got the string"):
        LinearizedModel(net, "0.weight")
    with pytest.raises(ValueError, match="no parameters"):
        LinearizedModel(net, [])
    with pytest.raises(ValueError, match="mode is 'fast'"):
        LinearizedModel(net, mode="fast")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="returns tuple, expected one tensor"):
        LinearizedModel(nn.LSTM(3, 2), example=torch.randn(2, 4, 3))


def _gradient_under_ddp(mode: Any, x: Tensor, cotangent: Tensor) -> dict[str, Tensor]:
    rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
    net = build_net("residual")
    if rank:
        for parameter in net.parameters():  # only rank 0 has loaded the weights
            nn.init.normal_(parameter)
    linear = LinearizedModel(net, mode=mode, example=x)
    parallel = DistributedDataParallel(linear)
    mine = slice(0, 3) if rank == 0 else slice(2 + rank, 3 + rank)  # 3 samples here, 1 on every other rank
    (size * (parallel(x[mine]) * cotangent[mine]).sum()).backward()
    return {name: p.grad for name, p in linear.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("mode", ["jvp", "vjp"])
@pytest.mark.parametrize("world_size", [2, 3])
def test_gradient_under_ddp_equals_a_single_process(world_size: int, mode: Any, x: Tensor) -> None:
    cotangent = torch.randn(5, 3, dtype=torch.float64)
    used = slice(0, 2 + world_size)
    expected = gradient(LinearizedModel(build_net("residual"), example=x), x[used], cotangent[used])
    for got in run_on_ranks(world_size, _gradient_under_ddp, mode, x, cotangent):
        assert got.keys() == expected.keys()
        for name in expected:
            assert (got[name] - expected[name]).norm() <= EXACT * (expected[name].norm() + 10)


def test_compiles_as_one_graph(x: Tensor) -> None:
    linear = move(LinearizedModel(build_net("residual"), example=x), random_direction(build_net("residual")))
    expected = linear(x).detach()
    compiled = torch.compile(linear, backend="aot_eager", fullgraph=True)
    assert close(compiled(x), expected)
    other = LinearizedModel(build_net("residual"), example=x)
    with torch.no_grad():
        other.model[0].weight.mul_(1.25)
        other.model[1].running_var.mul_(1.25)
    linear.load_state_dict(other.state_dict())
    assert close(torch.compile(linear, backend="aot_eager")(x), other(x))
    torch.compiler.reset()


def _gradient_under_fsdp(x: Tensor) -> dict[str, Tensor]:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    rank = torch.distributed.get_rank()
    linear = LinearizedModel(build_net("residual"), example=x)
    fully_shard(linear, mesh=init_device_mesh("cpu", (2,)))
    (2 * linear(x[:3] if rank == 0 else x[3:]).sum()).backward()
    return {name: delta.grad.full_tensor() for name, delta in linear.deltas.items() if delta.grad is not None}


@pytest.mark.filterwarnings("ignore")
def test_gradient_under_sharding_at_the_root_equals_a_single_process(x: Tensor) -> None:
    expected = gradient(LinearizedModel(build_net("residual"), example=x), x, torch.ones(5, 3, dtype=torch.float64))
    for got in run_on_ranks(2, _gradient_under_fsdp, x):
        for name, value in got.items():
            assert (value - expected[f"dw.{name}"]).norm() <= EXACT * (expected[f"dw.{name}"].norm() + 10)
