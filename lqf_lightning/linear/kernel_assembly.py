"""The work of assembling a kernel: passes over the data, products of layers, panels of processes."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.linear.kernel_layers import KernelLayer
from lqf_lightning.linear.kernel_panel import KernelPanel, exchange
from lqf_lightning.linear.kernel_plan import KernelPlan, split_into_passes
from lqf_lightning.linear.kernel_store import KernelStore
from lqf_lightning.linear.layer_gram import LayerGram
from lqf_lightning.linear.layer_records import LayerRecorder, Record
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.sample_rows import sample_rows
from lqf_lightning.linear.sample_stream import SampleStream, Watch

Records = dict[KernelLayer, Record]

TOTAL = "total"  # the group that scaled groups add up to
_SCRATCH = 2**28  # bytes of temporary results


@dataclass
class KernelAssembly:
    """One assembly.

    Attributes:
        network: Private copy of the network in evaluation mode.
        state: Its parameters and buffers, detached.
        plan: What the trial run found.
        form: Form of the kernel.
        directions: Cotangents (V, C), the same for all samples.
        streams: Training samples; others.
        reducer: Speaks to the other processes.
        watch: Wraps the layers.
        budget: Bytes of records that are kept at a time.
        store: Where finished groups go; None keeps them in the results only.
        scales: Groups are added up as they are finished, each times its scale, into one named `TOTAL`; those left out
            or with scale 0 are not computed. None keeps every group.
        results: Finished matrices of the training samples and of the others, by group.
    """

    network: nn.Module
    state: Mapping[str, Tensor]
    plan: KernelPlan
    form: KernelForm
    directions: Tensor
    streams: tuple[SampleStream, SampleStream]
    reducer: Reducer
    watch: Watch
    budget: int
    store: KernelStore | None
    scales: Mapping[str, float] | None = None
    results: tuple[dict[str, Tensor], dict[str, Tensor]] = field(default_factory=lambda: ({}, {}))

    def run(self, groups: Sequence[str]) -> None:
        """Compute what the store does not hold.

        Args:
            groups: Layer groups.
        """
        wanted = [group for group in groups if self.scales is None or self.scales.get(group, 0.0) > 0]
        todo = [group for group in wanted if not self._fetch(group)]
        panels: dict[str, list[KernelPanel]] = {}  # of groups that are begun, usually one at a time
        passes = self._passes(todo)
        left = Counter(layer.group for layers in passes for layer in layers)
        for group in todo:
            if not left[group]:  # none of its parameters has a part in the outputs
                self._finish(group, self._panels())
        for layers in passes:
            records = [self._collect(stream, layers) for stream in self.streams]
            for layer in self.watch(layers):
                if layer.group not in panels:
                    panels[layer.group] = self._panels()
                self._add(panels[layer.group], layer, [record.pop(layer) for record in records])
                left[layer.group] -= 1
                if not left[layer.group]:
                    self._finish(layer.group, panels.pop(layer.group))
        if not wanted:  # all groups are frozen
            for panel, result in zip(self._panels(), self.results, strict=False):
                result[TOTAL] = panel.gather(self.reducer)

    @property
    def _parts(self) -> tuple[str, ...]:
        return ("train", "cross") if self.streams[1].layout.total else ("train",)

    @property
    def _shape(self) -> tuple[int, int]:
        outputs = self.plan.outputs
        return outputs if self.form == "diagonal" else 1, outputs if self.form == "full" else 1

    def _fetch(self, group: str) -> bool:
        found = [self.store.find(group, part) if self.store else None for part in self._parts]
        # The first process decides: others may have been stopped at another place.
        held = torch.tensor([all(matrix is not None for matrix in found)], device=self.directions.device).int()
        if not bool(self.reducer.broadcast_(held)):
            return False
        (blocks, k), columns = self._shape, self.streams[0].layout.total
        for place, (matrix, stream) in enumerate(zip(found, self.streams, strict=False)):
            if matrix is None or self.reducer.rank > 0:
                matrix = self.directions.new_zeros(blocks, stream.layout.total * k, columns * k)
            self._keep(place, group, self.reducer.broadcast_(matrix.to(self.directions)))
        return True

    def _panels(self) -> list[KernelPanel]:
        (blocks, k), columns = self._shape, self.streams[0].layout
        panels = []
        for stream, part in zip(self.streams, self._parts, strict=False):
            matrix = self.directions.new_zeros(blocks, stream.layout.own * k, columns.total * k)
            panels.append(KernelPanel(stream.layout, columns, k, matrix, part == "train"))
        return panels

    def _passes(self, groups: Sequence[str]) -> list[list[KernelLayer]]:
        cotangents, train = len(self.directions), self.streams[0].layout
        chosen = [
            layer.choose(self.form, cotangents, train.total) for layer in self.plan.layers if layer.group in groups
        ]
        most = max(sum(counts) for counts in zip(*(stream.layout.counts for stream in self.streams), strict=True))
        return split_into_passes(chosen, self.budget // self.directions.itemsize // most, cotangents)

    def _collect(self, stream: SampleStream, layers: Sequence[KernelLayer]) -> Records:
        count, own = len(self.directions), stream.layout.own
        records = {layer: Record.empty(layer, own, count, self.directions) for layer in layers}
        known = [layer for layer in layers if layer.kind != "rest"]
        rest = [layer for layer in layers if layer.kind == "rest"]
        passing = sum(layer.passing_numbers(count) for layer in known)
        # Small batches are slow, so that this may take more than other temporary results.
        size = max(min(4 * _SCRATCH, self.budget // 2) // self.directions.itemsize // max(passing, 1), 1)
        with LayerRecorder(self.network, self.state, known) as recorder, torch.set_grad_enabled(count > 0):
            for x, start in stream.parts(size) if own else ():
                if known:
                    recorder.record(x, self.directions.unsqueeze(1).expand(-1, len(x), -1), records, start)
                if rest:
                    self._differentiate(x, rest, records, start)
        return records

    def _differentiate(self, x: Tensor, layers: Sequence[KernelLayer], records: Records, start: int) -> None:
        names = list(dict.fromkeys(name for layer in layers for name in layer.parameters))
        numbers = len(self.directions) * sum(self.state[name].numel() for name in names)
        chunk = max(min(_SCRATCH // self.directions.itemsize // numbers, 8), 1)
        for at in range(0, len(x), chunk):
            part = x[at : at + chunk]
            rows = sample_rows(
                self.network, self.state, names, part, self.directions, batched=self.plan.batched, chunk=chunk
            )
            for layer in layers:
                place = slice(start + at, start + at + len(part))
                records[layer].deltas[place] = rows[layer.parameters[0]][:, :, layer.start : layer.stop]

    def _add(self, panels: Sequence[KernelPanel], layer: KernelLayer, records: Sequence[Record]) -> None:
        module = self.network.get_submodule(layer.module) if layer.kind != "rest" else None
        scratch = max(min(_SCRATCH, self.budget // 8), 2**20) // self.directions.itemsize
        gram = LayerGram(layer, module, self.form, scratch)
        for source, count in enumerate(self.streams[0].layout.counts):
            if count:
                own = records[0] if source == self.reducer.rank else None
                train = exchange(own, layer, records[0], count, source, self.reducer)
                for panel, record in zip(panels, records, strict=False):
                    panel.add(gram, record, train, source)

    def _finish(self, group: str, panels: list[KernelPanel]) -> None:
        for place in range(len(panels)):
            self._keep(place, group, panels.pop(0).gather(self.reducer))

    def _keep(self, place: int, group: str, matrix: Tensor) -> None:
        if self.store is not None:
            self.store.put(group, self._parts[place], matrix)
        result = self.results[place]
        if self.scales is None:
            result[group] = matrix
        elif TOTAL in result:
            result[TOTAL].add_(matrix, alpha=self.scales[group])
        else:  # what the store holds must stay as it is
            result[TOTAL] = matrix.mul_(self.scales[group]) if self.store is None else matrix * self.scales[group]
