import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from linear.nets import build_net, dense_jacobian, random_direction
from lqf_lightning.linear import KFAC, DistributedReducer, LinearizedModel, Reducer, current_reducer, fit_kfac
from ranks import run_on_ranks

EXACT = 1e-10  # relative, float64: eigenvectors lose a few digits against plain products


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return bool((got - want).norm() <= tolerance * want.norm())


def flat_jacobian(net: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    """(B, C, P) over the named parameters, in their order."""
    jacobian = dense_jacobian(net, x)
    return torch.cat([jacobian[name].flatten(2) for name in names], 2)


def gauss_newton(net: nn.Module, x: Tensor, names: list[str]) -> Tensor:
    rows = flat_jacobian(net, x, names)
    return torch.einsum("bcp,bcq->pq", rows, rows) / len(x)


def layer_block(kfac: KFAC, name: str) -> Tensor:
    """`A (x) G` of one layer in the order (weight row-major, then bias)."""
    layer = kfac.factors[name]
    blocks = [torch.kron(g, a) for a, g in zip(layer.inputs, layer.outputs, strict=True)]
    whole, width = torch.block_diag(*blocks), layer.inputs.shape[-1]
    if layer.bias is None:
        return whole
    position = torch.arange(len(whole))
    is_bias = position % width == width - 1
    order = torch.cat([position[~is_bias], position[is_bias]])
    return whole[order][:, order]


def mlp() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()


def draw(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(3))


def as_dense(kfac: KFAC, shapes: dict[str, torch.Size]) -> Tensor:
    """The preconditioner as a matrix, one unit gradient at a time."""
    sizes = [shape.numel() for shape in shapes.values()]
    columns = []
    for unit in torch.eye(sum(sizes), dtype=torch.float64):
        parts = zip(shapes.items(), unit.split(sizes), strict=True)
        result = kfac.precondition({name: part.view(shape) for (name, shape), part in parts})
        columns.append(torch.cat([result[name].flatten() for name in shapes]))
    return torch.stack(columns, 1)


def shapes_of(net: nn.Module) -> dict[str, torch.Size]:
    return {name: p.shape for name, p in net.named_parameters()}


@pytest.mark.parametrize("bias", [True, False])
def test_one_dense_layer_converges_in_one_full_step(bias: bool) -> None:
    net, x, target, damping = nn.Linear(5, 3, bias=bias).double(), draw(7, 5), draw(7, 3), 0.3
    kfac = fit_kfac(net, None, [x[:4], x[4:]], damping=damping, relative_floor=0.0)
    linear = LinearizedModel(net, example=x)

    def gradient() -> dict[str, Tensor]:
        linear.zero_grad()
        penalty = sum(delta.square().sum() for delta in linear.deltas.values())
        ((linear(x) - target).square().sum() / (2 * len(x)) + damping / 2 * penalty).backward()
        return {name: delta.grad for name, delta in linear.deltas.items() if delta.grad is not None}

    start = gradient()
    with torch.no_grad():
        for name, step in kfac.precondition(start).items():
            linear.deltas[name] -= step
    left = gradient()
    assert all(left[name].norm() <= 1e-12 * start[name].norm() for name in start)


def test_one_sample_gives_exact_blocks_of_dense_layers() -> None:
    net, x = mlp(), draw(1, 4)
    kfac = fit_kfac(net, None, [x], damping=0.1)
    for name in ("0", "2"):
        assert close(layer_block(kfac, name), gauss_newton(net, x, [f"{name}.weight", f"{name}.bias"]))


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_a_convolution_with_one_position_gives_its_exact_block(groups: int) -> None:
    torch.manual_seed(0)
    # A second layer mixes the groups, whose cross blocks the factors drop by construction.
    net = nn.Sequential(nn.Conv2d(4, 8, 3, groups=groups), nn.Tanh(), nn.Flatten(), nn.Linear(8, 2)).double()
    x = draw(1, 4, 3, 3)
    kfac = fit_kfac(net, ["0.weight", "0.bias"], [x], damping=0.1)
    dense = gauss_newton(net, x, ["0.weight", "0.bias"])
    channel = torch.cat([torch.arange(8).repeat_interleave(36 // groups), torch.arange(8)]) // (8 // groups)
    assert close(layer_block(kfac, "0"), dense * (channel[:, None] == channel[None, :]))


def test_a_convolution_over_the_whole_input_has_the_factors_of_a_dense_layer() -> None:
    dense = nn.Sequential(nn.Flatten(), nn.Linear(18, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    conv = nn.Sequential(nn.Conv2d(2, 4, 3), nn.Flatten(), nn.Tanh(), nn.Linear(4, 2)).double()
    conv.load_state_dict({
        "0.weight": dense[1].weight.view(4, 2, 3, 3), "0.bias": dense[1].bias,
        "3.weight": dense[3].weight, "3.bias": dense[3].bias,
    })  # fmt: skip
    x = draw(6, 2, 3, 3)
    got, want = (fit_kfac(net, None, [x], damping=0.1).factors for net in (conv, dense))
    for a, b in (("0", "1"), ("3", "3")):
        assert close(got[a].inputs, want[b].inputs)
        assert close(got[a].outputs, want[b].outputs)


@pytest.mark.parametrize("options", [
    {"padding": 1}, {"padding": "same", "dilation": 2}, {"stride": 2, "padding": (1, 0)},
    {"padding": 1, "padding_mode": "reflect"}, {"groups": 2, "padding": "valid"},
])  # fmt: skip
def test_patches_reproduce_the_convolution(options: dict[str, Any]) -> None:
    from lqf_lightning.linear.kronecker_factors import split_inputs

    conv, x = nn.Conv2d(4, 6, 3, bias=False, **options).double(), draw(2, 4, 7, 6)
    output = conv(x)
    patches = split_inputs(conv, x, output[0, 0].numel())
    weight = conv.weight.view(conv.groups, 6 // conv.groups, -1)
    assert close(torch.einsum("bgtd,god->bgot", patches, weight).reshape(output.shape), output)


def test_patches_follow_the_padding_of_tensorflow() -> None:
    from timm.layers import Conv2dSame

    from lqf_lightning.linear.kronecker_factors import split_inputs

    conv, x = Conv2dSame(2, 3, 3, stride=2, bias=False).double(), draw(2, 2, 8, 7)
    patches = split_inputs(conv, x, 16)
    assert close((patches[:, 0] @ conv.weight.flatten(1).T).mT.reshape(2, 3, 4, 4), conv(x))


def test_constant_maps_make_expand_too_small_by_their_positions_and_reduce_exact() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2)).double()
    x = draw(1, 2, 1, 1).expand(1, 2, 4, 4)
    exact = gauss_newton(net, x, ["0.weight", "0.bias"])
    expand, reduce = (fit_kfac(net, None, [x], damping=0.1, form=form) for form in ("expand", "reduce"))
    assert close(layer_block(reduce, "0"), exact)
    assert close(16 * layer_block(expand, "0"), exact)


def test_uncorrelated_positions_make_expand_exact() -> None:
    # Every position feeds an output of its own through the same weights: J_t^T J_s vanishes for t != s.
    net = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False), nn.Flatten()).double()
    x = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64).view(1, 1, 2, 2)
    assert close(layer_block(fit_kfac(net, None, [x], damping=0.1), "0"), gauss_newton(net, x, ["0.weight"]))


@pytest.mark.parametrize("kind", ["residual", "depthwise", "transformer"])
def test_other_parameters_get_the_exact_diagonal(kind: str, x: Tensor) -> None:
    net = build_net(kind)
    kfac = fit_kfac(net, None, [x[:2], x[2:]], damping=0.1, chunk=2)
    covered = {n for layer in kfac.factors.values() for n in (layer.weight, layer.bias) if n}
    assert covered.isdisjoint(kfac.diagonals)
    assert covered | set(kfac.diagonals) == set(shapes_of(net))
    jacobian = dense_jacobian(net, x)
    for name, diagonal in kfac.diagonals.items():
        assert close(diagonal, jacobian[name].square().sum((0, 1)) / len(x)), name


def test_attention_of_torch_falls_back_to_the_diagonal() -> None:
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attend = nn.MultiheadAttention(4, 2, batch_first=True)
            self.out = nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            return self.out(self.attend(x, x, x, need_weights=False)[0].mean(1))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    net, x = Attention().double().eval(), draw(3, 5, 4)
    kfac = fit_kfac(net, None, [x], damping=0.1)
    assert set(kfac.factors) == {"out"}
    jacobian = dense_jacobian(net, x)
    for name in ("attend.in_proj_weight", "attend.out_proj.weight"):
        assert close(kfac.diagonals[name], jacobian[name].square().sum((0, 1)) / len(x))


def test_preconditioner_inverts_its_own_model_of_the_curvature(x: Tensor) -> None:
    net, damping = build_net("residual"), 0.2
    kfac = fit_kfac(net, None, [x], damping=damping, relative_floor=0.01)
    shapes = shapes_of(net)
    inverse = as_dense(kfac, shapes)
    start = 0
    offsets = {name: (start, start := start + shape.numel()) for name, shape in shapes.items()}
    expected = torch.zeros_like(inverse)
    for name, layer in kfac.factors.items():
        rows = torch.cat([torch.arange(*offsets[n]) for n in (layer.weight, layer.bias) if n])
        block = layer_block(kfac, name)
        floor = damping + 0.01 * block.diagonal().mean()
        expected[rows[:, None], rows] = torch.linalg.inv(block + floor * torch.eye(len(block), dtype=torch.float64))
    for name, diagonal in kfac.diagonals.items():
        rows = torch.arange(*offsets[name])
        expected[rows, rows] = 1 / (diagonal + damping + 0.01 * diagonal.mean()).flatten()
    assert close(inverse, expected)


def test_error_contracts_as_predicted() -> None:
    net, x, target, damping, rate = mlp(), draw(6, 4), draw(6, 2), 0.5, 0.2
    names, shapes = list(shapes_of(net)), shapes_of(net)
    rows = flat_jacobian(net, x, names)
    hessian = gauss_newton(net, x, names) + damping * torch.eye(rows.shape[-1], dtype=torch.float64)
    optimum = torch.linalg.solve(hessian, torch.einsum("bcp,bc->p", rows, target - net(x).detach()) / len(x))
    kfac = fit_kfac(net, None, [x], damping=damping)
    linear = LinearizedModel(net, example=x)
    optimizer = torch.optim.SGD(linear.deltas.values(), lr=rate)
    for _ in range(10):
        optimizer.zero_grad()
        penalty = sum(delta.square().sum() for delta in linear.deltas.values())
        ((linear(x) - target).square().sum() / (2 * len(x)) + damping / 2 * penalty).backward()
        steps = kfac.precondition({n: d.grad for n, d in linear.deltas.items() if d.grad is not None})
        for name, delta in linear.deltas.items():
            delta.grad = steps[name]
        optimizer.step()
    shrink = torch.eye(len(hessian), dtype=torch.float64) - rate * as_dense(kfac, shapes) @ hessian
    error = torch.cat([delta.detach().flatten() for delta in linear.deltas.values()]) - optimum
    assert close(error, -torch.linalg.matrix_power(shrink, 10) @ optimum)
    assert error.norm() < 0.5 * optimum.norm()


def test_factors_do_not_depend_on_dw_and_are_positive_semidefinite(x: Tensor) -> None:
    net = build_net("residual")
    reference = fit_kfac(copy.deepcopy(net), None, [x], damping=0.1)
    linear = LinearizedModel(net, example=x)
    with torch.no_grad():
        for name, delta in linear.deltas.items():
            delta.copy_(random_direction(net)[name])
    with torch.inference_mode():
        moved = fit_kfac(linear, None, [x], damping=0.1)
    for name, layer in reference.factors.items():
        for a, b in ((layer.inputs, moved.factors[name].inputs), (layer.outputs, moved.factors[name].outputs)):
            assert torch.equal(a, b)
            assert torch.linalg.eigvalsh(a).min() >= -1e-12 * a.norm()


@pytest.mark.parametrize("kind", ["residual", "depthwise"])
def test_random_cotangents_are_unbiased(kind: str, x: Tensor) -> None:
    net, draws = build_net(kind), 100
    exact = fit_kfac(net, None, [x], damping=0.1)
    state = torch.get_rng_state()
    fits = [fit_kfac(net, None, [x], damping=0.1, cotangents="random", seed=seed) for seed in range(draws)]
    assert torch.equal(torch.get_rng_state(), state)
    for name, layer in exact.factors.items():
        values = torch.stack([fit.factors[name].outputs for fit in fits])
        # The squared error of a mean is expected to be the variance over the number of draws.
        error, spread = (values.mean(0) - layer.outputs).norm(), (values.var(0).sum() / draws).sqrt()
        assert error <= 3 * spread + 1e-12 * layer.outputs.norm()
        assert spread < 0.2 * layer.outputs.norm()
    for name, diagonal in exact.diagonals.items():
        values = torch.stack([fit.diagonals[name] for fit in fits])
        assert (values.mean(0) - diagonal).norm() <= 3 * (values.var(0).sum() / draws).sqrt() + 1e-12 * diagonal.norm()


def test_a_single_output_needs_no_luck() -> None:
    net, x = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 1)).double(), draw(5, 4)
    exact, random = (fit_kfac(net, None, [x], damping=0.1, cotangents=c) for c in ("exact", "random"))
    assert close(random.factors["0"].outputs, exact.factors["0"].outputs)


def test_only_trained_parameters_are_covered(x: Tensor) -> None:
    names = ["3.conv2.bias", "3.bn2.weight", "6.weight"]
    net = build_net("residual")
    kfac = fit_kfac(net, names, [x], damping=0.1)
    assert set(kfac.factors) == {"3.conv2", "6"}
    assert kfac.factors["3.conv2"].inputs.shape == (1, 1, 1)
    assert kfac.factors["6"].inputs.shape == (1, 4, 4)
    assert set(kfac.diagonals) == {"3.bn2.weight"}
    result = kfac.precondition({name: torch.ones_like(net.get_parameter(name)) for name in names})
    assert set(result) == set(names)


def test_the_network_is_left_as_it_was(x: Tensor) -> None:
    net = build_net("residual").train().requires_grad_(True)
    before = copy.deepcopy(net.state_dict())
    fit_kfac(net, None, [x], damping=0.1)
    assert net.training
    assert all(p.requires_grad and p.grad is None for p in net.parameters())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert not any(module._forward_hooks for module in net.modules())


def test_bad_arguments_are_explained() -> None:
    net, x = mlp(), draw(2, 4)
    with pytest.raises(ValueError, match="damping=-1"):
        fit_kfac(net, None, [x], damping=-1)
    with pytest.raises(ValueError, match="at least one is positive"):
        fit_kfac(net, None, [x], damping=0, relative_floor=0)
    with pytest.raises(ValueError, match="cotangents='labels'"):
        fit_kfac(net, None, [x], damping=1, cotangents="labels")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="no sample"):
        fit_kfac(net, None, [], damping=1)
    with pytest.raises(ValueError, match=r"first odd one is '0\.bias'"):
        fit_kfac(net, None, [x], damping=1).precondition({"0.weight": net[0].weight.detach()})


def _fit_shard(x: Tensor, shards: list[list[int]]) -> dict[str, Tensor]:
    rank = dist.get_rank() if dist.is_initialized() else 0
    reducer = DistributedReducer() if dist.is_initialized() else Reducer()
    net = build_net("residual")
    batches = [x[shards[rank]]] if shards[rank] else []
    kfac = fit_kfac(net, None, batches, damping=0.1, reducer=reducer)
    return kfac.precondition(random_direction(net))


@pytest.mark.parametrize("shards", [[[0, 1, 2, 3, 4]], [[0, 1, 2, 3], [4]], [[4, 2], [0, 1, 3], []]])
def test_ranks_agree_with_a_single_process(shards: list[list[int]], x: Tensor) -> None:
    expected = _fit_shard(x, [[0, 1, 2, 3, 4]])
    results = run_on_ranks(len(shards), _fit_shard, x, shards)
    for got in results:
        for name, want in expected.items():
            assert close(got[name], want)
            assert torch.equal(got[name], results[0][name])


@pytest.mark.parametrize("shards", [[[0, 1, 2, 3], [4]], [[4, 2], [0, 1, 3], []]])
def test_random_cotangents_belong_to_samples_not_to_ranks(shards: list[list[int]], x: Tensor) -> None:
    def fit() -> Tensor:
        reducer = current_reducer()
        own = [x[shards[reducer.rank]]] if shards[reducer.rank] else []
        fitted = fit_kfac(build_net("residual"), None, own, damping=0.1, cotangents="random", reducer=reducer)
        return fitted.factors["0"].outputs

    alone = fit_kfac(build_net("residual"), None, [x], damping=0.1, cotangents="random").factors["0"].outputs
    other = fit_kfac(build_net("residual"), None, [x], damping=0.1, cotangents="random", seed=1).factors["0"].outputs
    assert all(close(outputs, alone) for outputs in run_on_ranks(len(shards), fit))
    assert not close(other, alone, 1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("form", ["expand", "reduce"])
def test_agrees_with_curvlinops(form: Any) -> None:
    curvlinops = pytest.importorskip("curvlinops")
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 3, 3, padding=1), nn.LeakyReLU(0.1), nn.Conv2d(3, 4, 3, stride=2), nn.LeakyReLU(0.1),
        nn.Flatten(), nn.Linear(16, 3),
    ).double()  # fmt: skip
    x = draw(5, 2, 6, 6)
    kfac = fit_kfac(net, None, [x], damping=0.1, form=form)
    operator = curvlinops.KFACLinearOperator(
        net, nn.MSELoss(reduction="sum"), list(net.parameters()), [(x, torch.zeros(5, 3, dtype=torch.float64))],
        fisher_type="type-2", kfac_approx=form, separate_weight_and_bias=False,
    )  # fmt: skip
    theirs = operator @ torch.eye(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
    # They differentiate |f - y|^2 summed over the data, we |f - y|^2 / 2 averaged.
    ours = 2 * len(x) * torch.block_diag(*[layer_block(kfac, name) for name in ("0", "2", "5")])
    assert close(ours, theirs)


class _Windows(nn.Module):
    """A layer on 16 tokens, which may see them as four windows of four, the way window attention does."""

    def __init__(self, folded: bool) -> None:
        super().__init__()
        self.folded, self.inner, self.head = folded, nn.Linear(4, 3), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.inner(x.reshape(-1, 4, 4)).reshape(len(x), 16, 3) if self.folded else self.inner(x)
        return self.head(hidden.tanh().mean(1))


@pytest.mark.parametrize("form", ["expand", "reduce"])
def test_windows_folded_into_the_batch_change_nothing(form: Any) -> None:
    torch.manual_seed(0)
    plain, folded = _Windows(False).double(), _Windows(True).double()
    folded.load_state_dict(plain.state_dict())
    x = draw(6, 16, 4)
    expected, got = (fit_kfac(net, None, [x], damping=0.1, form=form).factors["inner"] for net in (plain, folded))
    assert close(got.inputs, expected.inputs)
    assert close(got.outputs, expected.outputs)


def test_any_scale_and_damping_come_from_the_same_eigenvectors(x: Tensor) -> None:
    net = build_net("residual")
    kfac = fit_kfac(net, None, [x], damping=0.2)
    damping = {name: 0.3 if name.startswith("3.") else 2.0 for name in kfac.names}
    v = random_direction(net)
    solved, multiplied = kfac.solve(v, scale=7.0, damping=damping), kfac.multiply(v, scale=7.0, damping=damping)
    assert all(close(kfac.multiply(solved, scale=7.0, damping=damping)[name], v[name]) for name in v)
    for name, layer in kfac.factors.items():
        members = [n for n in (layer.weight, layer.bias) if n]
        block = 7 * layer_block(kfac, name)
        block += damping[members[0]] * torch.eye(len(block), dtype=torch.float64)
        together = torch.cat([v[n].flatten() for n in members])
        assert close(torch.cat([multiplied[n].flatten() for n in members]), block @ together)
        assert close(torch.cat([solved[n].flatten() for n in members]), torch.linalg.solve(block, together))
    for name, diagonal in kfac.diagonals.items():
        assert close(multiplied[name], (7 * diagonal + damping[name]) * v[name])
        assert close(solved[name], v[name] / (7 * diagonal + damping[name]))
    assert close(kfac.multiply(v)["0.weight"], kfac.multiply(v, scale=1.0, damping=0.0)["0.weight"])
    plain = fit_kfac(net, None, [x], damping=0.2, relative_floor=0.0)
    assert all(close(plain.solve(v, scale=1.0, damping=0.2)[n], plain.precondition(v)[n]) for n in v)


@pytest.mark.parametrize("damping", [0.0, -1.0, {"weight": 0.5, "bias": 0.0}])
def test_an_inverse_needs_damping(damping: Any) -> None:
    net = nn.Linear(3, 2).double()
    kfac = fit_kfac(net, None, [draw(4, 3)], damping=1.0)
    with pytest.raises(ValueError, match="damping of an inverse must be positive"):
        kfac.solve(random_direction(net), scale=1.0, damping=damping)


def test_an_intercept_at_its_optimum_leaves_the_schur_complement() -> None:
    net, x = nn.Linear(5, 3).double(), draw(7, 5) + 2.0
    kfac = fit_kfac(net, None, x.split(3), damping=0.1, intercept="bias")
    dense, cut = gauss_newton(net, x, ["weight", "bias"]), 15
    corner = torch.linalg.solve(dense[cut:, cut:], dense[cut:, :cut])
    assert kfac.names == {"weight"}
    assert close(layer_block(kfac, ""), dense[:cut, :cut] - dense[:cut, cut:] @ corner)
    centered = x - x.mean(0)
    assert close(kfac.factors[""].inputs[0], centered.T @ centered / len(x))


@pytest.mark.parametrize("parameters", [None, ["3.bn2.weight", "3.conv2.bias", "6.weight", "6.bias"]])
def test_an_intercept_changes_its_own_layer_only(parameters: Any, x: Tensor) -> None:
    net = build_net("residual")
    whole = fit_kfac(net, parameters, [x], damping=0.1)
    eliminated = fit_kfac(net, parameters, [x], damping=0.1, intercept="6.bias")
    assert eliminated.names == whole.names - {"6.bias"}
    assert set(eliminated.diagonals) == set(whole.diagonals)
    v = {name: entry for name, entry in random_direction(net).items() if name in whole.names}
    want = whole.precondition(v)
    v.pop("6.bias")
    got = eliminated.precondition(v)
    assert set(got) == set(v)
    for name in v:
        assert close(got[name], want[name]) != (name == "6.weight")
    assert torch.equal(eliminated.factors["6"].outputs, whole.factors["6"].outputs)


def test_an_intercept_without_a_trained_weight_leaves_nothing_of_its_layer(x: Tensor) -> None:
    kfac = fit_kfac(build_net("residual"), ["0.weight", "6.bias"], [x], damping=0.1, intercept="6.bias")
    assert kfac.names == {"0.weight"}
    assert set(kfac.factors) == {"0"}


@pytest.mark.parametrize("intercept", ["6.weight", "3.bn2.bias", "head"])
def test_an_intercept_must_be_the_bias_of_a_layer(intercept: str, x: Tensor) -> None:
    with pytest.raises(ValueError, match=rf"'{intercept}' is no bias of a fitted layer; these are .*'6\.bias'"):
        fit_kfac(build_net("residual"), None, [x], damping=0.1, intercept=intercept)


@pytest.mark.parametrize("shards", [[[0, 1, 2, 3], [4]], [[4, 2], [0, 1, 3], []]])
def test_an_intercept_is_eliminated_after_the_sum_over_ranks(shards: list[list[int]], x: Tensor) -> None:
    def fit() -> Tensor:
        reducer = current_reducer()
        own = [x[shards[reducer.rank]]] if shards[reducer.rank] else []
        fitted = fit_kfac(build_net("residual"), None, own, damping=0.1, reducer=reducer, intercept="6.bias")
        return fitted.factors["6"].inputs

    alone = fit_kfac(build_net("residual"), None, [x], damping=0.1, intercept="6.bias").factors["6"].inputs
    assert all(close(inputs, alone) for inputs in run_on_ranks(len(shards), fit))


def test_an_intercept_of_a_convolution_is_eliminated_over_all_positions() -> None:
    net = nn.Sequential(nn.Conv2d(2, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten()).double()
    x = draw(5, 2, 3, 4) + 1.0
    kfac = fit_kfac(net, None, [x], damping=0.1, intercept="0.bias")
    patches = x.transpose(0, 1).flatten(1).mT
    centered = patches - patches.mean(0)
    assert close(kfac.factors["0"].inputs[0], centered.T @ centered / len(x))
