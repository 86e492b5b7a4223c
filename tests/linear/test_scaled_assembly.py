import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from linear.nets import build_net
from lqf_lightning.linear import kernel_assembly
from lqf_lightning.linear.assemble import KernelPair, assemble_kernel
from lqf_lightning.linear.kernel_panel import KernelPanel
from lqf_lightning.linear.linearized import LinearizedModel
from lqf_lightning.linear.reducer import current_reducer
from ranks import run_on_ranks

EXACT = 1e-12  # relative, float64: sums of a few matrices in another order


def close(got: Tensor, want: Tensor, tolerance: float = EXACT) -> bool:
    return got.shape == want.shape and bool((got - want).norm() <= tolerance * want.norm())


def by_child(net: nn.Module) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name, _ in net.named_parameters():
        groups.setdefault(name.split(".")[0], []).append(name)
    return groups


def draw(*shape: int, seed: int = 3) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def assemble(net: nn.Module, x: Tensor, **options: Any) -> KernelPair:
    model = LinearizedModel(copy.deepcopy(net), example=x)
    return assemble_kernel(model, by_child(net), list(x.split(2)), **options)


def some_scales(net: nn.Module) -> dict[str, float]:
    return {group: 0.3 * (place + 1) ** 2 for place, group in enumerate(by_child(net))}


@pytest.mark.parametrize("form", ["full", "diagonal", "trace"])
@pytest.mark.parametrize("budget", [2**31, 20_000])
def test_scaled_groups_add_up_to_the_total(x: Tensor, form: Any, budget: int) -> None:
    net, y = build_net("residual"), draw(3, 3, 8, 8)
    scales, whole = some_scales(net), assemble(net, x, other=[y], form=form)
    pair = assemble(net, x, other=[y], form=form, scales=scales, budget=budget)
    assert pair.cross is not None
    assert whole.cross is not None
    assert list(pair.train.groups) == list(pair.cross.groups) == ["total"]
    assert (pair.train.form, pair.train.outputs) == (form, whole.train.outputs)
    assert close(pair.train.total(), whole.train.total(scales))
    assert close(pair.cross.total(), whole.cross.total(scales))


def test_frozen_groups_are_not_computed(x: Tensor) -> None:
    net, seen = build_net("residual"), []

    def watch(items: Any) -> Any:
        seen.extend(item.group for item in items if hasattr(item, "group"))
        return iter(items)

    whole, (first, *_, last) = assemble(net, x), by_child(net)
    pair = assemble(net, x, scales={last: 0.5, first: 0.0}, watch=watch)
    assert close(pair.train.total(), 0.5 * whole.train.groups[last].double())
    assert set(seen) == {last}
    nothing = assemble(net, x, scales={first: 0.0})
    assert torch.equal(nothing.train.groups["total"], torch.zeros_like(whole.train.groups[last]))


def test_one_group_at_a_time_is_in_memory(x: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    net, alive, most = build_net("residual"), 0, 0
    build, gather = kernel_assembly.KernelAssembly._panels, KernelPanel.gather

    def counting(self: Any) -> list[KernelPanel]:
        nonlocal alive, most
        alive, most = alive + 1, max(most, alive + 1)
        return build(self)

    def done(self: KernelPanel, reducer: Any) -> Tensor:
        nonlocal alive
        alive -= 1
        return gather(self, reducer)

    monkeypatch.setattr(kernel_assembly.KernelAssembly, "_panels", counting)
    monkeypatch.setattr(KernelPanel, "gather", done)
    assemble(net, x, scales=some_scales(net))
    assert (most, alive) == (1, 0)


def test_groups_in_the_store_stay_as_they_are_and_serve_any_scales(x: Tensor) -> None:
    net, y, layers = build_net("residual"), draw(2, 3, 8, 8), []
    whole, store, scales = assemble(net, x, other=[y]), {}, some_scales(net)

    def watch(items: Any) -> Any:
        layers.extend(item for item in items if hasattr(item, "group"))
        return iter(items)

    first = assemble(net, x, other=[y], store=store, scales=scales)
    assert len(store) == 2 * len(scales)
    layers.clear()
    halves = {group: scale / 2 for group, scale in scales.items()}
    again = assemble(net, x, other=[y], store=store, scales=halves, watch=watch)
    assert not layers
    assert close(2 * again.train.total(), first.train.total())
    separate = assemble(net, x, other=[y], store=store, watch=watch)
    assert not layers
    for group, matrix in whole.train.groups.items():
        assert torch.equal(separate.train.groups[group], matrix)


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("keeps", [False, True])
def test_ranks_agree_with_a_single_process(world: int, keeps: bool, x: Tensor) -> None:
    net, y = build_net("residual"), draw(3, 3, 8, 8)
    scales, index = some_scales(net), torch.arange(5)
    want = assemble(net, x, other=[y], scales=scales)

    def work() -> list[Tensor]:
        reducer = current_reducer()
        own, others = index[reducer.rank :: world], torch.arange(3)[reducer.rank :: world]
        pair = assemble_kernel(
            LinearizedModel(copy.deepcopy(net), example=x), by_child(net), [x[own]], [y[others]], index=own,
            other_index=others, reducer=reducer, scales=scales, store={} if keeps and reducer.rank == 0 else None,
        )  # fmt: skip
        assert pair.cross is not None
        return [pair.train.groups["total"], pair.cross.groups["total"]]

    assert want.cross is not None
    for train, cross in run_on_ranks(world, work):
        assert close(train, want.train.groups["total"])
        assert close(cross, want.cross.groups["total"])


def test_odd_scales_are_refused(x: Tensor) -> None:
    net = build_net("residual")
    for scales in ({"unknown": 1.0}, {next(iter(by_child(net))): -1.0}, {next(iter(by_child(net))): float("nan")}, {}):
        with pytest.raises(ValueError, match="scales must be finite and not negative, for groups among"):
            assemble(net, x, scales=scales)
