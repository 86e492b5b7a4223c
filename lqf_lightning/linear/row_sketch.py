"""Random sketches of all Jacobian rows, made layer by layer: what preconditions conjugate gradients."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lqf_lightning.linear.affine_norm import use_affine_norms
from lqf_lightning.linear.assemble import check_groups, widened
from lqf_lightning.linear.fold_plan import FoldPlan
from lqf_lightning.linear.folded_network import FoldedNetwork
from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.kernel_layers import KernelLayer
from lqf_lightning.linear.kernel_plan import KernelPlan, plan_kernel
from lqf_lightning.linear.layer_records import LayerRecorder, Record
from lqf_lightning.linear.layer_rows import layer_vectors, outer_rows
from lqf_lightning.linear.linearized import LinearizedModel
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.sample_rows import sample_rows
from lqf_lightning.linear.sample_stream import SampleStream

_IN_FLIGHT = 2**26  # numbers: inputs and cotangents of a batch
_IN_CACHE = 2**21  # numbers: rows of some channels, which are made, signed and added up while they are at hand


@full_precision()
def sketch_rows(
    model: LinearizedModel,
    groups: Mapping[str, Sequence[str]],
    batches: Iterable[Tensor],
    columns: int,
    *,
    scales: Mapping[str, float] | None = None,
    seed: int = 0,
    index: Tensor | None = None,
    reducer: Reducer | None = None,
    watch: Callable[[Any], Iterable[Any]] = iter,
) -> Tensor:
    r"""Compress every row of the Jacobian to D numbers, :math:`\Phi = J S`, with :math:`E[\Phi \Phi^T] = J M^{-1} J^T`.

    S gives every parameter a random sign and adds it to one of D columns, as a CountSketch does (Charikar, Chen &
    Farach-Colton, 2002), columns taken in turn from a random one on, so that folding a row costs one pass over it. The
    rows of a layer follow from its inputs and cotangents, C backward passes per batch, and are never kept.

    With D a few times the number of rows, :math:`\Phi \Phi^T` is within a constant factor of the kernel in *every*
    direction (Avron, Maymounkov & Toledo, Blendenpik, 2010), although no entry is exact: unfit to solve with, but a
    preconditioner whose number of iterations hardly depends on the ridge.

    Args:
        model: The linearized model; its `dw` plays no part.
        groups: Parameter names by layer group; what is in none stays out.
        batches: Inputs (B, ...) of this process, the same every time.
        columns: D.
        scales: Inverse penalty weights by layer group; None means 1. Groups left out count as 0, that is, frozen.
        seed: Of signs and columns, the same on all processes.
        index: Global index (n,) of this process's samples; None numbers those of a single process.
        reducer: Speaks to the other processes.
        watch: Wraps the batches, for a progress bar.

    Returns:
        Sketches (n, C, D) of all processes' samples by ascending index, the same on every process.

    Raises:
        ValueError: There is no column, the groups do not fit the model, or a scale is negative or of no group.

    Example:
        >>> import torch
        >>> x = torch.tensor([[1.0, 2.0], [0.0, 1.0]])
        >>> model = LinearizedModel(torch.nn.Linear(2, 1), example=x)
        >>> rows = sketch_rows(model, {"weights": ["weight"]}, [x], columns=2).flatten(1)
        >>> (rows @ rows.T).tolist()  # exact, since no column holds two parameters of this layer
        [[5.0, 2.0], [2.0, 1.0]]
    """
    if columns < 1:
        raise ValueError(f"a sketch needs at least one column, got {columns}")
    check_groups(model, groups)
    scales = dict.fromkeys(groups, 1.0) if scales is None else scales
    odd = [name for name, scale in scales.items() if name not in groups or scale < 0]
    if odd or not scales:
        raise ValueError(f"scales must be non-negative, for groups among {list(groups)}; got {dict(scales)}")
    reducer = reducer or Reducer()
    device = next(model.parameters()).device
    with torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        network = use_affine_norms(FoldedNetwork(model.model, FoldPlan()).structure.eval())
        state = widened(network)
        like = next(iter(state.values()))
        samples = SampleStream.of(batches, index, like, reducer, watch, False)
        plan = plan_kernel(network, state, groups, samples.first, reducer)
        folder = _Folder(network, state, plan, columns, scales, seed)
        own = like.new_zeros(samples.layout.own, plan.outputs, columns)
        for x, start in samples.parts(folder.batch_size) if samples.layout.own else ():
            folder.add(x, own[start : start + len(x)])
        return reducer.gather_rows(own, samples.layout.own_index.to(device))[0]


class _Folder:
    """Makes the rows of one layer after the other and adds them up in the columns."""

    def __init__(
        self,
        network: nn.Module,
        state: Mapping[str, Tensor],
        plan: KernelPlan,
        columns: int,
        scales: Mapping[str, float],
        seed: int,
    ) -> None:
        self.network, self.state, self.plan, self.columns = network, state, plan, columns
        like = next(iter(state.values()))
        self.directions = torch.eye(plan.outputs).to(like)
        self.known = [layer.choose("full", plan.outputs, 1) for layer in plan.layers if layer.kind != "rest"]
        self.rest = [layer for layer in plan.layers if layer.kind == "rest"]
        generator = torch.Generator().manual_seed(seed)
        self.signs, self.starts = {}, {}
        for layer in (*self.known, *self.rest):
            drawn = torch.randint(2, (layer.columns,), generator=generator).to(like) * 2 - 1
            self.signs[layer] = drawn * scales.get(layer.group, 0.0) ** 0.5
            self.starts[layer] = int(torch.randint(columns, (), generator=generator))
        numbers = sum(layer.passing_numbers(plan.outputs) + layer.numbers(plan.outputs) for layer in self.known)
        numbers += sum(plan.outputs * layer.columns for layer in self.rest)
        self.batch_size = max(_IN_FLIGHT // max(numbers, 1), 1)

    def add(self, x: Tensor, out: Tensor) -> None:
        count, cotangents = len(x), len(self.directions)
        records = {layer: Record.empty(layer, count, cotangents, self.directions) for layer in self.known}
        with LayerRecorder(self.network, self.state, self.known) as recorder:
            recorder.record(x, self.directions.unsqueeze(1).expand(-1, count, -1), records, 0)
        for layer in self.known:
            self._add_layer(layer, records.pop(layer), out)
        if self.rest:
            names = [name for layer in self.rest for name in layer.parameters]
            rows = sample_rows(self.network, self.state, names, x, self.directions, batched=self.plan.batched)
            for layer in self.rest:
                self._fold(layer, rows.pop(layer.parameters[0]), 0, out)

    def _add_layer(self, layer: KernelLayer, record: Record, out: Tensor) -> None:
        if layer.rows:
            self._fold(layer, record.deltas, 0, out)
            return
        vectors = layer_vectors(layer, self.network.get_submodule(layer.module), record.inputs, layer.positions)
        step = layer.channels // layer.blocks if layer.blocks > 1 else 1
        room = _IN_CACHE // (record.deltas.shape[0] * record.deltas.shape[1] * layer.width)
        size = max(room // step * step, step)
        for start in range(0, layer.channels, size):
            stop = min(start + size, layer.channels)
            self._fold(layer, outer_rows(layer, vectors, record.deltas, start, stop), start * layer.width, out)

    def _fold(self, layer: KernelLayer, rows: Tensor, start: int, out: Tensor) -> None:
        rows.mul_(self.signs[layer][start : start + rows.shape[-1]])
        place, taken = (self.starts[layer] + start) % self.columns, 0
        while taken < rows.shape[-1]:
            count = min(self.columns - place, rows.shape[-1] - taken)
            out[..., place : place + count] += rows[..., taken : taken + count]
            place, taken = 0, taken + count
