"""Which batch normalizations of a network its convolutions can absorb, and which activations may work in place.

Found in one forward pass, by the identity of the tensors that travel between modules; nothing is traced, so any
Python control flow is fine.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from lqf_lightning.linear.batch_norm import is_batch_norm

ABSORBING = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)
IN_PLACE = (nn.ReLU, nn.LeakyReLU, nn.ReLU6)


@dataclass(frozen=True)
class FoldPlan:
    """Names of the modules that change when a network is folded.

    Attributes:
        pairs: (convolution, batch normalization): the second becomes part of the first.
        affine: Batch normalizations that become a plain affine map.
        in_place: Activations that may overwrite their input.
    """

    pairs: tuple[tuple[str, str], ...] = ()
    affine: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()

    def milder(self) -> list["FoldPlan"]:
        """List this plan and ever more careful ones, ending with the one that changes nothing.

        Returns:
            Distinct plans, the boldest first.
        """
        norms = tuple(sorted({*self.affine, *(norm for _, norm in self.pairs)}))
        plans = [self, replace(self, in_place=()), FoldPlan(affine=norms), FoldPlan()]
        return list(dict.fromkeys(plans))


class _Recorder:
    """Watches the tensors that enter and leave the modules during one forward pass."""

    def __init__(self, model: nn.Module) -> None:
        self.names = {module: name for name, module in model.named_modules()}
        self.aliases = Counter(module for _, module in model.named_modules(remove_duplicate=False))
        self.producer: dict[int, tuple[nn.Module, int]] = {}
        self.readers: Counter[int] = Counter()
        self.calls: Counter[nn.Module] = Counter()
        self.pairs: list[tuple[nn.Module, nn.Module, int]] = []
        self.in_place: list[tuple[nn.Module, int]] = []
        self.alive: list[Tensor] = []  # an id is unique only while its tensor lives

    def before(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if not inputs or not isinstance(inputs[0], Tensor):
            return
        tensor = inputs[0]
        self.alive.append(tensor)
        if not isinstance(module, (nn.Identity, nn.Sequential)):  # they only pass it on
            self.readers[id(tensor)] += 1
        if is_batch_norm(module):
            maker, version = self.producer.get(id(tensor), (None, -1))
            # An in-place operation in between keeps the identity and moves the version.
            if maker is not None and version == tensor._version:
                self.pairs.append((maker, module, id(tensor)))
        elif isinstance(module, IN_PLACE):
            self.in_place.append((module, id(tensor)))

    def after(self, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        self.calls[module] += 1
        if isinstance(output, Tensor):
            self.alive.append(output)
            if isinstance(module, ABSORBING):
                self.producer[id(output)] = (module, output._version)

    def plan(self, input_id: int) -> FoldPlan:
        # Whatever ran more than once, or has more than one name, stays as it is.
        once = {module for module, count in self.calls.items() if count == 1 and self.aliases[module] == 1}
        # A tensor that a block reads besides its first normalization also travels around it, as in pre-activation nets.
        pairs = [(c, n) for c, n, read in self.pairs if c in once and n in once and self.readers[read] == 1]
        absorbed = {norm for _, norm in pairs}
        affine = [m for m in self.names if is_batch_norm(m) and m not in absorbed and self.aliases[m] == 1]
        # One activation module often serves several places of a block; all of them must be safe.
        needed = {m for m, read in self.in_place if self.readers[read] > 1 or read == input_id}
        in_place = [m for m in dict.fromkeys(m for m, _ in self.in_place) if m not in needed]
        name = self.names.__getitem__
        return FoldPlan(
            pairs=tuple((name(c), name(n)) for c, n in pairs),
            affine=tuple(map(name, affine)),
            in_place=tuple(map(name, in_place)),
        )


def plan_folding(model: nn.Module, example: Tensor) -> FoldPlan:
    """Watch one forward pass and say what can be folded.

    Args:
        model: A network in evaluation mode.
        example: An input of it; the values do not matter, two samples are enough.

    Returns:
        The boldest plan that the observation supports. Uses outside of modules (`y = conv(x); bn(y) + y`) are not
        seen, so compare the folded network with the original before trusting it.
    """
    recorder = _Recorder(model)
    example = example.clone()
    with ExitStack() as stack, torch.no_grad():
        for module in recorder.names:
            remove: list[Callable[[], None]] = [
                module.register_forward_pre_hook(recorder.before).remove,
                module.register_forward_hook(recorder.after).remove,
            ]
            for callback in remove:
                stack.callback(callback)
        recorder.alive.append(example)
        model(example)
    return recorder.plan(id(example))
