"""What has to be noted for a kernel, in which order, and in how many passes; every structural claim is tried first."""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lqf_lightning.linear.kernel_layers import KernelLayer, list_candidates
from lqf_lightning.linear.layer_records import LayerRecorder, Record
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.sample_rows import sample_rows

State = Mapping[str, Tensor]


@dataclass(frozen=True)
class KernelPlan:
    """What a trial run of two samples found.

    Attributes:
        outputs: Number of outputs C of the network.
        layers: Layers that have a part in the outputs, by group and then in the order in which they run.
        last: Layers whose output is that of the network, and which have a single position.
        batched: Whether the network can be vectorized over samples.
    """

    outputs: int
    layers: tuple[KernelLayer, ...]
    last: tuple[KernelLayer, ...] = ()
    batched: bool = True


def plan_kernel(
    network: nn.Module, state: State, groups: Mapping[str, Sequence[str]], x: Tensor | None, reducer: Reducer
) -> KernelPlan:
    """Try the structure of every layer against the gradient of one sample, and agree on it over processes.

    A layer whose inputs are no batch of samples, or whose rows are not the gradient, is taken for a parameter without
    a known structure, which is slower and always right.

    Args:
        network: Private copy of the network in evaluation mode.
        state: Its parameters and buffers, detached.
        groups: Parameter names by layer group.
        x: Some input (B, ...) of this process; None if it has no sample.
        reducer: Speaks to the other processes.

    Returns:
        The plan, the same on every process.

    Raises:
        ValueError: No process has a sample.
    """
    holders = torch.zeros(reducer.world_size, device=next(iter(state.values())).device)
    holders[reducer.rank] = x is not None
    holders = reducer.sum_(holders)
    if not bool(holders.any()):
        raise ValueError("there is no training sample: the batches are empty on every process")
    source = int(holders.argmax())
    text = json.dumps(asdict(_try(network, state, groups, x))) if reducer.rank == source and x is not None else ""
    found = json.loads(_tell(text, source, reducer, holders.device))
    layers, last = (tuple(_restore(entry) for entry in found[key]) for key in ("layers", "last"))
    return KernelPlan(found["outputs"], layers, last, found["batched"])


def _restore(entry: dict[str, object]) -> KernelLayer:
    return KernelLayer(**{**entry, "inputs": tuple(entry["inputs"])})  # type: ignore[arg-type]  # as asdict wrote it


def _tell(text: str, source: int, reducer: Reducer, device: torch.device) -> str:
    data = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    length = int(reducer.broadcast_(torch.tensor([len(data)], device=device), source))
    data = data if reducer.rank == source else data.new_zeros(length)
    return bytes(reducer.broadcast_(data, source).tolist()).decode()


def _try(network: nn.Module, state: State, groups: Mapping[str, Sequence[str]], x: Tensor) -> KernelPlan:
    pair = torch.cat([x, x])[:2]
    truth, output, direction = _true_gradient(network, state, [n for names in groups.values() for n in names], pair)
    candidates = list_candidates(network, groups)
    records = {layer: Record.empty(layer, 2, 1, output) for layer in candidates}
    with LayerRecorder(network, state, candidates) as recorder:
        recorder.record(pair, direction.unsqueeze(0), records, 0)
    layers, last = [], []
    for layer, calls in recorder.calls.items():
        if layer in recorder.strange or not _agree(records[layer].deltas[:, 0], _row(layer, truth), output.dtype):
            continue
        delta = calls[0].deltas
        if layer.kind == "outer" and delta is not None:
            shape = calls[0].inputs.shape
            sized = replace(layer, windows=shape[1], inputs=tuple(shape[2:]), positions=delta.shape[-1])
            layers.append(replace(sized, calls=len(calls)))
            if (
                len(calls) == 1
                and delta.shape[2:] == (output.shape[1], 1)
                and torch.equal(delta[:, 0, :, 0], direction)
            ):
                last.append(layers[-1])
        elif layer.kind == "norm":
            layers.append(layer)
    known = {name for layer in layers for name in layer.parameters}
    rest = [name for name, gradient in truth.items() if gradient is not None and name not in known]
    batched = _can_batch(network, state, rest, pair, direction, truth) if rest else True
    group_of = {name: group for group, names in groups.items() for name in names}
    sizes_of = {name: state[name].numel() for name in rest}
    layers += [KernelLayer(group_of[n], "", n, None, "rest", channels=size, stop=size) for n, size in sizes_of.items()]
    order = {group: place for place, group in enumerate(dict.fromkeys(layer.group for layer in layers))}
    return KernelPlan(
        output.shape[1], tuple(sorted(layers, key=lambda layer: order[layer.group])), tuple(last), batched
    )


def _true_gradient(
    network: nn.Module, state: State, names: Sequence[str], pair: Tensor
) -> tuple[dict[str, Tensor | None], Tensor, Tensor]:
    leaves = {name: state[name].detach().requires_grad_() for name in names}
    output: Tensor = functional_call(network, {**state, **leaves}, (pair,))
    if output.ndim != 2 or len(output) != 2:
        raise ValueError(f"expected outputs (B, C), got {tuple(output.shape)} for two samples")
    # The second sample has no part in it: whatever turns up there belongs to another sample.
    draw = torch.randn(output.shape[1], generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    direction = torch.stack([draw, torch.zeros_like(draw)]).to(output)
    gradients: Sequence[Tensor | None] = [None] * len(names)
    if output.requires_grad:
        gradients = torch.autograd.grad(output, list(leaves.values()), direction, allow_unused=True)
    return dict(zip(names, gradients, strict=True)), output.detach(), direction


def _row(layer: KernelLayer, truth: Mapping[str, Tensor | None]) -> Tensor | None:
    parts = [gradient for name in layer.parameters if (gradient := truth[name]) is not None]
    if len(parts) < len(layer.parameters):
        return None
    return torch.cat([part.reshape(layer.channels if layer.kind == "outer" else 1, -1) for part in parts], 1).flatten()


def _agree(rows: Tensor, truth: Tensor | None, dtype: torch.dtype) -> bool:
    if truth is None:
        return False
    error = torch.cat([rows[0].flatten() - truth, rows[1:].flatten()]).double().norm()
    return bool(error <= (1e-8 if dtype == torch.float64 else 1e-3) * truth.double().norm() + 1e-30)


def _can_batch(
    network: nn.Module, state: State, names: Sequence[str], pair: Tensor, direction: Tensor, truth: Mapping[str, object]
) -> bool:
    try:
        rows = sample_rows(network, state, names, pair, direction[:1])
    except (RuntimeError, ValueError, NotImplementedError):
        return False  # operators that vmap has no rule for: the same rows follow from one sample at a time
    expected = torch.cat([gradient.flatten() for name in names if isinstance(gradient := truth[name], Tensor)])
    found = torch.cat([rows[name][:1, 0] for name in names], 1)
    return _agree(torch.cat([found, torch.zeros_like(found)]), expected, pair.dtype)


def split_into_passes(layers: Iterable[KernelLayer], numbers: int, cotangents: int) -> list[list[KernelLayer]]:
    """Deal layers out over passes over the data, none of which keeps more than there is room for.

    Args:
        layers: Layers with their choices made.
        numbers: What may be kept per sample.
        cotangents: Number of cotangents.

    Returns:
        Layers, or parts of them, by pass; in order.
    """
    passes: list[list[KernelLayer]] = [[]]
    room = numbers
    for layer in layers:
        for part in layer.split(numbers, cotangents):
            need = part.numbers(cotangents)
            if passes[-1] and need > room:
                passes.append([])
                room = numbers
            passes[-1].append(part)
            room -= need
    return [part for part in passes if part]
