"""The Jacobian of one batch after another in the coordinates of a folded network."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.func import functional_call, jvp

from lqf_lightning.linear.attention import math_attention
from lqf_lightning.linear.folded_network import FoldedNetwork, Tensors
from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.linearized import LinearizedModel

Direction = Mapping[str, Tensor]
Transform = Callable[[list[Tensor]], list[Tensor]]


class FoldedJacobian:
    """Products with the Jacobians of batches, and their sums.

    Directions are folded once per pass over the data and sums brought back once, since either map costs a third of a
    forward evaluation for small images. Everything here wants to run inside `exactly`.

    Args:
        model: The linearized model.
        x: Some input (B, ...).

    Attributes:
        network: The folded network.
    """

    def __init__(self, model: LinearizedModel, x: Tensor) -> None:
        self.network: FoldedNetwork = model.folded(x)
        self.deltas = model.deltas
        self.reverse_only = model.mode == "vjp"
        self.mapped: Tensors = {}
        self.sums: list[list[Tensor]] = []

    def fold(self, directions: Sequence[Direction], whole: bool = False) -> list[Tensors]:
        """Bring directions to the coordinates of the folded network.

        Args:
            directions: Movements by parameter name; what is left out does not move.
            whole: Whether to name every folded tensor, also those that do not move.

        Returns:
            Movements by the name of the folded tensor, one mapping per direction.

        Raises:
            ValueError: A name is not that of a linearized parameter.
        """
        odd = [name for direction in directions for name in direction if name not in self.deltas]
        if odd:
            known = ", ".join(list(self.deltas)[:3])
            raise ValueError(f"{odd[0]!r} is not among the linearized parameters, the first of which are {known}")
        folded = []
        with torch.no_grad():
            for direction in directions:
                entries = {name: ordinary(entry) for name, entry in direction.items()}
                rest = [name for name in self.deltas if whole and name not in direction]
                entries.update({name: torch.zeros_like(self.deltas[name]) for name in rest})
                folded.append(self.network.tangents(entries))
        return folded

    def push(self, x: Tensor, tangents: Tensors) -> Tensor:
        """Apply J.

        Args:
            x: Input (B, ...).
            tangents: A folded direction.

        Returns:
            `J v` (B, C), differentiable in the direction.
        """
        return self.value_and_push(x, tangents)[1]

    def value_and_push(self, x: Tensor, tangents: Tensors) -> tuple[Tensor, Tensor]:
        """Evaluate the network at `w0` and apply J, in the work of the second alone.

        Args:
            x: Input (B, ...).
            tangents: A folded direction.

        Returns:
            `f0` and `J v` (B, C), the latter differentiable in the direction.
        """
        moving = {name: self.network.state[name] for name in tangents}
        with math_attention(self.network.has_fast_path):
            value, derivative, *_ = jvp(lambda primals: self._evaluate(x, primals), (moving,), (tangents,))
        return value, derivative

    def pull(self, x: Tensor, rows: list[Tensor]) -> None:
        """Add `J^T r` to the sums.

        Args:
            x: Input (B, ...).
            rows: Right-hand sides r (B, C), as many in every call.
        """
        names = self._begin(len(rows))
        leaves = {name: self.network.state[name].detach().requires_grad_() for name in names}
        output = self._evaluate(x, leaves)
        for k, row in enumerate(rows):
            self._add(k, output, leaves, row, k + 1 < len(rows))

    def push_pull(self, x: Tensor, tangents: list[Tensors], transform: Transform) -> None:
        """Add `J^T r(J v)` to the sums, from one evaluation if the model is differentiated in forward mode.

        Args:
            x: Input (B, ...).
            tangents: Folded directions v that name every folded tensor.
            transform: Makes right-hand sides r of the rows `J v` (B, C), without a graph.
        """
        if self.reverse_only:
            with torch.no_grad():
                rows = [widen(self.push(x, tangent)) for tangent in tangents]
            self.pull(x, transform(rows))
            return
        self._begin(len(tangents))
        leaves = [{name: t.detach().requires_grad_() for name, t in tangent.items()} for tangent in tangents]
        outputs = [self.push(x, leaf) for leaf in leaves]
        rows = transform([widen(output.detach()) for output in outputs])
        for k, (output, leaf, row) in enumerate(zip(outputs, leaves, rows, strict=True)):
            self._add(k, output, leaf, row, False)

    def pulled(self) -> list[Tensors]:
        """Bring the sums back to the coordinates of the original parameters.

        Returns:
            `J^T r` by parameter name, for every right-hand side, in the type of the parameters.
        """
        ends, starts = list(self.mapped.values()), list(self.zeros.values())
        result = []
        for sums in self.sums:
            gradients = [entry.to(end.dtype) for entry, end in zip(sums, ends, strict=True)]
            # The map to folded coordinates is linear, so its derivative at zero is its transpose.
            pulled = torch.autograd.grad(ends, starts, gradients, retain_graph=True, materialize_grads=True)
            result.append(dict(zip(self.zeros, pulled, strict=True)))
        return result

    def _begin(self, count: int) -> list[str]:
        if not self.sums:
            self.zeros = {name: torch.zeros_like(delta, requires_grad=True) for name, delta in self.deltas.items()}
            self.mapped = self.network.tangents(self.zeros)
            # Metal knows no double precision.
            wide = torch.float32 if any(t.is_mps for t in self.zeros.values()) else torch.float64
            self.sums = [[torch.zeros_like(t, dtype=wide) for t in self.mapped.values()] for _ in range(count)]
        return list(self.mapped)

    def _add(self, k: int, output: Tensor, leaves: Tensors, row: Tensor, again: bool) -> None:
        chosen = [leaves[name] for name in self.mapped]
        gradients = torch.autograd.grad(output, chosen, row.to(output), retain_graph=again, materialize_grads=True)
        torch._foreach_add_(self.sums[k], gradients)

    def _evaluate(self, x: Tensor, moved: Tensors) -> Tensor:
        state = {**self.network.state, **moved}
        output: Tensor = functional_call(self.network.structure, state, (x,), tie_weights=False)
        return output


@contextmanager
def exactly(device: torch.device, differentiate: bool) -> Iterator[None]:
    """Compute in the type of the parameters, whatever the surroundings say.

    An optimum is only as good as the products that certify it, so neither autocast nor TF32 may round them; and what
    is differentiated must not be under `inference_mode`, where Lightning validates.

    Args:
        device: Where the computation runs.
        differentiate: Whether a graph may be built.

    Yields:
        Nothing.
    """
    autocast = torch.autocast(device.type, enabled=False)
    with full_precision(), torch.inference_mode(False), torch.set_grad_enabled(differentiate), autocast:
        yield


def ordinary(tensor: Tensor) -> Tensor:
    """Detach a tensor, and copy it if it was made under `inference_mode`, which no backward pass may keep.

    Args:
        tensor: Any tensor.

    Returns:
        The same values.
    """
    return tensor.clone() if tensor.is_inference() else tensor.detach()


def widen(tensor: Tensor) -> Tensor:
    """Bring half precision to single precision.

    Args:
        tensor: Any tensor.

    Returns:
        The tensor itself, if it is in single or double precision.
    """
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor
