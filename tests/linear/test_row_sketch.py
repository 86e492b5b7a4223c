import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear.nets import build_net, dense_jacobian
from lqf_lightning.linear import LinearizedModel, current_reducer
from lqf_lightning.linear import row_sketch as module
from lqf_lightning.linear.row_sketch import sketch_rows
from ranks import run_on_ranks

Groups = dict[str, list[str]]


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def by_child(net: nn.Module) -> Groups:
    groups: Groups = {}
    for name, _ in net.named_parameters():
        groups.setdefault(name.split(".")[0], []).append(name)
    return groups


def sketch(net: nn.Module, x: Tensor, columns: int = 40, groups: Groups | None = None, **options: Any) -> Tensor:
    model = LinearizedModel(net, example=x[:2])
    return sketch_rows(model, groups or by_child(net), list(x.split(2)), columns, **options)


def gram(rows: Tensor) -> Tensor:
    flat = rows.flatten(0, 1)
    return flat @ flat.T


def dense_gram(net: nn.Module, x: Tensor, scales: dict[str, float]) -> Tensor:
    """`J M^-1 J^T` of the parameters named in the scales."""
    jacobian = dense_jacobian(net, x)
    return gram(torch.cat([scale**0.5 * jacobian[name].flatten(2) for name, scale in scales.items()], 2))


def close(got: Tensor, want: Tensor, tolerance: float = 1e-12) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * want.norm())


class Scaled(nn.Module):
    """A parameter of no known structure."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.rand(width, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x.sin() + x * self.scale


def small_net() -> nn.Module:
    """One layer of every kind, fewer parameters than 40 samples have outputs, and no two of the same effect."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 2, stride=2), nn.Tanh(), nn.GroupNorm(2, 4), nn.Tanh(), nn.Conv2d(4, 4, 2, groups=2), Scaled(4),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3),
    ).double()  # fmt: skip


@pytest.mark.parametrize("columns", [1, 7, 200])
@pytest.mark.parametrize("cache", [1, 2**21])
def test_every_parameter_has_a_sign_and_a_column(columns: int, cache: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_IN_CACHE", cache)
    net, x = small_net(), draw(40, 1, 6, 6)
    factors = {"0": 1.0, "2": 4.0, "4": 0.25, "5": 9.0, "8": 1.0}
    rows = sketch(net, x, columns, scales=factors)
    assert rows.shape == (40, 3, columns)
    names = [name for name, _ in net.named_parameters()]
    jacobian = torch.cat([entry.flatten(2) for entry in dense_jacobian(net, x).values()], 2).flatten(0, 1)
    assert int(torch.linalg.matrix_rank(jacobian)) == jacobian.shape[1] < len(jacobian)
    found = torch.linalg.lstsq(jacobian, rows.flatten(0, 1)).solution
    assert close(jacobian @ found, rows.flatten(0, 1), 1e-10)  # one linear map for all samples
    scale = torch.cat([
        torch.full((net.get_parameter(name).numel(),), factors[name[0]] ** 0.5, dtype=torch.float64) for name in names
    ])
    signs = found / scale[:, None]
    assert (signs - signs.round()).abs().max() < 1e-7
    assert torch.equal(signs.round().abs().sum(1), torch.ones(len(scale), dtype=torch.float64))
    assert signs.round().unique().tolist() == ([-1.0, 1.0] if columns == 1 else [-1.0, 0.0, 1.0])
    load = signs.round().abs().sum(0)
    assert load.max() - load.min() <= 5  # in turn, so that those of a layer differ by one at most


def test_kernels_are_right_on_average(net: nn.Module, x: Tensor) -> None:
    groups, seeds = by_child(net), 40
    scales = {group: 0.5 + place for place, group in enumerate(groups)}
    want = dense_gram(net, x[:3], {name: scales[group] for group, names in groups.items() for name in names})
    found = torch.stack([gram(sketch(net, x[:3], 30, groups, scales=scales, seed=seed)) for seed in range(seeds)])
    # The squared error of a mean is expected to be the variance over the number of draws.
    error = math.sqrt(float(found.var(0).sum()) / seeds)
    assert 0 < error < 0.2 * want.norm()
    assert (found.mean(0) - want).norm() <= 3 * error
    traces = found.diagonal(dim1=1, dim2=2).sum(1)
    assert abs(float(traces.mean() - want.trace())) <= 3 * float(traces.std()) / math.sqrt(seeds)


@pytest.mark.parametrize("cache", [1, 2**21])
def test_with_a_column_per_parameter_every_layer_is_exact(
    net: nn.Module, x: Tensor, cache: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_IN_CACHE", cache)
    owners: Groups = {}
    for name, _ in net.named_parameters():
        owners.setdefault(name.rpartition(".")[0], []).append(name)
    own = owners.pop("", [])
    for names in [*owners.values(), *([name] for name in own)]:
        columns = sum(net.get_parameter(name).numel() for name in names)
        got = gram(sketch(net, x[:3], columns, {"layer": names}))
        assert close(got, dense_gram(net, x[:3], dict.fromkeys(names, 1.0)), 1e-10), names


def test_the_batches_and_what_is_in_flight_play_no_part(
    net: nn.Module, x: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, groups = LinearizedModel(net, example=x), by_child(net)
    whole = sketch_rows(model, groups, [x], 50)
    for parts in (x.split(1), x.split(3), [x[:0], x]):
        assert close(sketch_rows(model, groups, list(parts), 50), whole)
    sizes: list[int] = []
    add = module._Folder.add
    monkeypatch.setattr(module._Folder, "add", lambda self, x, out: (sizes.append(len(x)), add(self, x, out)))
    for numbers, most in ((1, 1), (40_000, 5)):
        monkeypatch.setattr(module, "_IN_FLIGHT", numbers)
        for cache in (1, 300):
            monkeypatch.setattr(module, "_IN_CACHE", cache)
            sizes.clear()
            assert close(sketch_rows(model, groups, [x], 50), whole)
            assert max(sizes) <= most


def test_seeds_give_other_maps_and_the_same_seed_the_same(x: Tensor) -> None:
    net = build_net("residual")
    first = sketch(net, x, seed=1)
    assert torch.equal(first, sketch(net, x, seed=1))
    assert (first - sketch(net, x, seed=2)).norm() > 0.5 * first.norm()


def test_layers_begin_at_random_columns(x: Tensor) -> None:
    # Else the first columns would hold parameters of all layers, and the last ones those of large layers only.
    places = []
    for seed in range(8):
        filled = sketch(build_net("residual"), x, 1000, {"bias": ["6.bias"]}, seed=seed).abs().sum((0, 1)).nonzero()
        assert len(filled) == 3
        places.append(tuple(filled.flatten().tolist()))
    assert len(set(places)) == 8


def test_frozen_parameters_and_groups_without_a_scale_are_left_out(x: Tensor) -> None:
    net, groups = build_net("residual"), {"head": ["6.weight"], "norm": ["3.bn2.weight", "3.bn2.bias"]}
    head = dense_gram(net, x, {"6.weight": 1.0})
    assert close(gram(sketch(net, x, 12, {"head": groups["head"]})), head)
    assert close(gram(sketch(net, x, 12, groups, scales={"head": 3.0})), 3 * head)
    assert close(gram(sketch(net, x, 12, groups, scales={"head": 3.0, "norm": 0.0})), 3 * head)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_single_precision_networks_give_single_precision(dtype: torch.dtype, x: Tensor) -> None:
    net = build_net("residual", dtype)
    rows = sketch(net, x.to(dtype))
    assert rows.dtype == torch.float32
    assert close(rows.double(), sketch(build_net("residual", dtype).double(), x.to(dtype).double()), 1e-5)


def test_samples_are_ordered_by_index_and_count_once(x: Tensor) -> None:
    net, whole = build_net("residual"), sketch(build_net("residual"), x)
    twice = torch.stack([x[0], x[1], x[0], x[3], x[4]])
    assert close(sketch(net, twice, index=torch.tensor([4, 1, 4, 7, 0])), whole[[4, 1, 0, 3]])


def test_the_network_is_left_as_it_was(x: Tensor) -> None:
    net = build_net("residual").requires_grad_(False)
    model, want = LinearizedModel(net, example=x), sketch(build_net("residual"), x)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.inference_mode():
        inside = sketch_rows(model, by_child(net), [x[:2].clone(), x[2:].clone()], 40)
    assert close(inside, want)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(part._forward_hooks or part._forward_pre_hooks for part in model.modules())
    with torch.no_grad():
        next(iter(model.deltas.values())).add_(1.0)
    assert close(sketch_rows(model, by_child(net), [x], 40), want)


@pytest.mark.parametrize("kind", ["residual", "transformer"])
@pytest.mark.parametrize(
    "shards",
    [
        [[4, 0, 3, 1, 2]],
        [[3, 1, 4, 0], [2, 0]],  # sample 0 is padding
        [[1, 0], [], [4, 0, 3, 2]],
    ],
)
def test_ranks_agree_with_a_single_process(kind: str, shards: list[list[int]], x: Tensor) -> None:
    want = sketch(build_net(kind), x)

    def work() -> Tensor:
        reducer = current_reducer()
        own = torch.tensor(shards[reducer.rank], dtype=torch.int64)
        net = build_net(kind)
        batches = list(x[own].split(2)) if len(own) else []
        model = LinearizedModel(net, example=x)
        return sketch_rows(model, by_child(net), batches, 40, index=10 * own, reducer=reducer)

    results = run_on_ranks(len(shards), work)
    for rows in results:
        assert close(rows, want)
        assert torch.equal(rows, results[0])


def test_bad_arguments_are_explained(x: Tensor) -> None:
    net = build_net("residual")
    with pytest.raises(ValueError, match="at least one column, got 0"):
        sketch(net, x, 0)
    with pytest.raises(ValueError, match=r"'4\.weight' is no linearized parameter"):
        sketch(net, x, groups={"all": ["4.weight"]})
    for scales in ({"6": -1.0}, {"7": 1.0}, {}):
        with pytest.raises(ValueError, match=r"non-negative, for groups among \['0'.* got \{"):
            sketch(net, x, scales=scales)
    with pytest.raises(ValueError, match="no training sample"):
        sketch_rows(LinearizedModel(net, example=x), by_child(net), [], 4)
    with pytest.raises(TypeError, match="generator, which is spent"):
        sketch_rows(LinearizedModel(net, example=x), by_child(net), (part for part in x.split(2)), 4)
