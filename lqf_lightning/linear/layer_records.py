"""Inputs and cotangents of layers, noted while a network runs forward once and backward once per cotangent."""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lqf_lightning.linear.kernel_layers import KernelLayer
from lqf_lightning.linear.layer_rows import layer_cotangents, layer_vectors, norm_inputs, norm_rows, outer_rows


@dataclass
class Record:
    """What is kept of n samples of a layer.

    Attributes:
        inputs: Inputs (n, windows, ...); empty where rows are kept.
        deltas: Cotangents (n, V, channels, T), or rows (n, V, columns).
    """

    inputs: Tensor
    deltas: Tensor

    @classmethod
    def empty(cls, layer: KernelLayer, samples: int, cotangents: int, like: Tensor) -> "Record":
        """Make room; rows are zeros, inputs and cotangents whatever was there.

        Args:
            layer: Its sizes.
            samples: Number of samples n.
            cotangents: Number of cotangents V.
            like: Gives type and device.

        Returns:
            A record to be filled in.
        """
        if layer.rows:
            return cls(like.new_zeros(0), like.new_zeros(samples, cotangents, layer.columns))
        shape = (samples, cotangents, layer.stop - layer.start, layer.positions)
        return cls(like.new_empty(samples, layer.windows, *layer.inputs), like.new_empty(shape))


@dataclass
class Call:
    """One run of a module.

    Attributes:
        inputs: Inputs (B, windows, ...), or what a normalization scales.
        deltas: Cotangents (B, V, channels, T); None until the first arrives, and for normalizations.
        seen: Number of cotangents that are filled in.
    """

    inputs: Tensor
    deltas: Tensor | None = None
    seen: int = 0

    def clear(self, start: int, stop: int) -> None:
        """Set cotangents to zero.

        Args:
            start: The first.
            stop: The one behind the last.
        """
        if self.deltas is not None and start < stop:
            self.deltas[:, start:stop] = 0


@dataclass
class LayerRecorder:
    """Fills records while a network runs. No gradient of a weight is ever formed.

    Hooks sit on output *tensors*; full backward hooks of modules break on the in-place additions of residual networks.

    Attributes:
        network: Private copy of the network in evaluation mode.
        state: Its parameters and buffers, detached.
        layers: Layers to listen to.
        calls: Runs of every layer in the last pass.
        strange: Layers whose inputs are no batch of samples.
        records: Where the present pass is kept, None while nobody listens.
        place: Rows of the present samples in the records.
        starts: Where differentiation begins: nothing before is listened to.
        cotangent: Number of the present backward pass.
        handles: Of the hooks.
    """

    network: nn.Module
    state: Mapping[str, Tensor]
    layers: Sequence[KernelLayer]
    calls: dict[KernelLayer, list[Call]] = field(default_factory=lambda: defaultdict(list))
    strange: set[KernelLayer] = field(default_factory=set)
    records: Mapping[KernelLayer, Record] | None = None
    place: slice = field(default_factory=lambda: slice(0, 0))
    starts: list[Tensor] = field(default_factory=list)
    cotangent: int = 0
    cotangents: int = 0
    handles: list[Any] = field(default_factory=list)

    def __enter__(self) -> "LayerRecorder":
        for layer in self.layers:
            module, hook = self.network.get_submodule(layer.module), _LayerHook(self, layer)
            inner = [child for name, child in module.named_children() if name == "drop"]
            self.handles.append(module.register_forward_pre_hook(hook.enter))
            # What timm appends to a normalization, drop-out first, is no part of it.
            leave = (
                inner[0].register_forward_pre_hook(hook.reach) if inner else module.register_forward_hook(hook.leave)
            )
            self.handles.append(leave)
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def record(self, x: Tensor, directions: Tensor, records: Mapping[KernelLayer, Record], start: int) -> Tensor:
        """Run forward once and backward for every direction.

        Args:
            x: Input (B, ...).
            directions: Cotangents (V, B, C).
            records: Where to note, by layer.
            start: Row of the first sample there.

        Returns:
            Output (B, C).
        """
        self.calls.clear()
        self.starts.clear()
        self.records, self.place, self.cotangents = records, slice(start, start + len(x)), len(directions)
        try:
            output: Tensor = functional_call(self.network, dict(self.state), (x,))
            for number, direction in enumerate(directions):
                self.cotangent = number
                if self.starts and output.requires_grad:
                    more = number + 1 < len(directions)
                    torch.autograd.grad(output, self.starts, direction, retain_graph=more, allow_unused=True)
        finally:
            self.records = None
        for layer in self.layers:
            if layer.kind == "outer":
                self._finish(layer, records[layer])
        return output.detach()

    def _finish(self, layer: KernelLayer, record: Record) -> None:
        calls = [call for call in self.calls.get(layer, []) if call.deltas is not None]
        for call in calls:
            call.clear(call.seen, self.cotangents)
        if layer.rows:
            record.deltas[self.place] = sum(self._rows(layer, call) for call in calls)
        elif not calls and self.cotangents:  # the outputs do not depend on it
            record.inputs[self.place] = record.deltas[self.place] = 0

    def _rows(self, layer: KernelLayer, call: Call) -> Tensor | int:
        if call.deltas is None:
            return 0
        module = self.network.get_submodule(layer.module)
        vectors = layer_vectors(layer, module, call.inputs, call.deltas.shape[-1])
        return outer_rows(layer, vectors, call.deltas, 0, layer.stop - layer.start)


@dataclass
class _LayerHook:
    recorder: LayerRecorder
    layer: KernelLayer
    arrived: Tensor | None = None

    def enter(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self.arrived = None
        records = self.recorder.records
        if records is None:
            return
        count = self.recorder.place.stop - self.recorder.place.start
        x = inputs[0].detach() if inputs and isinstance(inputs[0], Tensor) else None
        least = 4 if isinstance(module, nn.Conv2d) else 2
        if x is None or x.ndim < least or len(x) % count:
            self.recorder.strange.add(self.layer)
        elif self.layer.kind == "norm":
            self.arrived = norm_inputs(module, x)
        else:
            # No copy: an input that is changed in place behind its layer is refused by autograd in the trial run.
            split = x.reshape(count, -1, *x.shape[1:]) if self.layer.weight else x.new_zeros(count, len(x) // count, 0)
            self.arrived = split if self.layer.rows else self._store(records[self.layer], split)

    def _store(self, record: Record, inputs: Tensor) -> Tensor:
        kept = record.inputs[self.recorder.place]
        if inputs.shape != kept.shape:
            raise ValueError(
                f"the input of {self.layer.module!r} has shape {tuple(inputs.shape[1:])} per sample, and that of the "
                f"first samples was {tuple(kept.shape[1:])}: all samples must have the same size"
            )
        return kept.copy_(inputs)

    def reach(self, _: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        if self.arrived is None:
            return None
        started = self._listen(self.recorder.network.get_submodule(self.layer.module), inputs[0])
        return None if started is None else (started, *inputs[1:])

    def leave(self, module: nn.Module, _: tuple[Any, ...], output: Tensor) -> Tensor | None:
        return None if self.arrived is None else self._listen(module, output)

    def _listen(self, module: nn.Module, output: Tensor) -> Tensor | None:
        call, self.arrived = Call(self.arrived if self.arrived is not None else output), None
        self.recorder.calls[self.layer].append(call)
        started = None
        if not output.requires_grad and torch.is_grad_enabled():
            # Differentiation begins here. The clone may be changed in place.
            start = output.detach().requires_grad_()
            self.recorder.starts.append(start)
            output = started = start.clone()
        if output.requires_grad:
            output.register_hook(lambda delta: self._note(module, call, delta.detach()))  # type: ignore[no-untyped-call]
        return started

    def _note(self, module: nn.Module, call: Call, delta: Tensor) -> None:
        recorder, layer = self.recorder, self.layer
        if recorder.records is None:
            return
        record, count = (
            recorder.records[layer].deltas[recorder.place],
            len(recorder.records[layer].deltas[recorder.place]),
        )
        if layer.kind == "norm":
            rows = norm_rows(layer, module, call.inputs, delta, count)
            record[:, recorder.cotangent] += rows[:, layer.start : layer.stop]
            return
        split = layer_cotangents(layer, module, delta, count)
        if call.deltas is None:
            call.deltas = split.new_empty(count, recorder.cotangents, *split.shape[1:]) if layer.rows else record
        call.clear(call.seen, recorder.cotangent)  # of outputs that do not depend on the layer
        call.seen = recorder.cotangent + 1
        call.deltas[:, recorder.cotangent] = split
