"""Kronecker factors of the Gauss-Newton matrix of dense and convolutional layers.

For one sample and one cotangent `v` of the outputs, the gradient of a layer is `J^T v = sum_t delta_t a_t^T`: `a_t` are
its inputs (convolution patches, a one appended if the bias is trained) and `delta_t` the cotangents of its outputs at
position `t` of `T`. With `v` running over the outputs, or drawn with `E[v v^T] = I`, the block of the layer in
`H = (1/N) sum_i J_i^T J_i` is approximated by `A (x) G` (Grosse & Martens, arXiv 1602.01407):

    expand: A = E_x sum_t a_t a_t^T,        G = (1/T) E_x sum_t sum_v delta_t delta_t^T
    reduce: A = E_x (mean_t a_t)(...)^T,    G = E_x sum_v (sum_t delta_t)(...)^T

Both are exact for one position of one sample. `expand` is exact if the cotangents of different positions are
uncorrelated and alike, `reduce` if the inputs are the same at all positions. Where inputs and cotangents both are,
`expand` is too small by a factor of T.
"""

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call

from lqf_lightning.linear.outer_products import by_sample, is_kronecker_layer, split_inputs, split_outputs

Form = Literal["expand", "reduce"]


@dataclass
class KroneckerFactors:
    """Factors of one layer, per group of a convolution (one group for dense layers).

    Attributes:
        weight: Name of the weight, None if it is not trained.
        bias: Name of the bias, None if it is not trained.
        inputs: `A` (groups, d, d); the last row and column belong to the bias.
        outputs: `G` (groups, o, o).
    """

    weight: str | None
    bias: str | None
    inputs: Tensor
    outputs: Tensor


def _second_moment(vectors: Tensor) -> Tensor:
    # (B, groups, T, d) -> (groups, d, d), in single precision at least.
    wide = vectors if vectors.dtype == torch.float64 else vectors.float()
    flat = wide.transpose(0, 1).flatten(1, 2)
    return flat.mT @ flat


@dataclass
class FactorRecorder:
    """Accumulates factors while a network runs forward and backward.

    Hooks sit on output *tensors*; full backward hooks of modules break on the in-place additions of residual networks.

    Attributes:
        network: Private copy of the network in evaluation mode.
        trained: Names of the trained parameters.
        form: "expand" or "reduce".
        factors: Unnormalized factors by layer name, zero before the first pass.
        calls: How often each layer has run.
        starts: Where differentiation has to begin in the last forward pass.
        handles: Of the hooks.
        listening: Whether a pass is for the factors; the network may also run for other ends.
        batch: Number of samples in the last pass.
    """

    network: nn.Module
    trained: Collection[str]
    form: Form
    factors: dict[str, KroneckerFactors] = field(default_factory=dict)
    calls: Counter[str] = field(default_factory=Counter)
    starts: list[Tensor] = field(default_factory=list)
    handles: list[Any] = field(default_factory=list)
    listening: bool = False
    batch: int = 0

    def __enter__(self) -> "FactorRecorder":
        for name, module in self.network.named_modules():
            own = {key for key in ("weight", "bias") if _join(name, key) in self.trained}
            if own and is_kronecker_layer(module):
                self.factors[name] = _empty_factors(module, name, "weight" in own, "bias" in own)
                self.handles.append(module.register_forward_hook(_LayerHook(self, name)))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self.handles:
            handle.remove()

    def forward(self, x: Tensor) -> Tensor:
        """Run the network, noting inputs.

        Args:
            x: Input (B, ...).

        Returns:
            Output, ready for `torch.autograd.grad` with respect to `starts`.
        """
        self.starts.clear()
        self.batch = len(x)
        # Detached weights: no gradient of a weight is ever formed, and `starts` is where the first trained layer is.
        weights = {name: parameter.detach() for name, parameter in self.network.named_parameters()}
        self.listening = True
        try:
            output: Tensor = functional_call(self.network, weights, (x,))
        finally:
            self.listening = False
        return output


@dataclass
class _LayerHook:
    recorder: FactorRecorder
    name: str

    def __call__(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if not self.recorder.listening:
            return None
        positions = math.prod(output.shape[2:] if isinstance(module, nn.Conv2d) else output.shape[1:-1])
        self._note_inputs(module, inputs[0].detach(), positions)
        started = None
        if not output.requires_grad:
            # Differentiation begins here: nothing before this layer is trained. The clone may be changed in place.
            start = output.detach().requires_grad_()
            self.recorder.starts.append(start)
            output = started = start.clone()
        output.register_hook(  # type: ignore[no-untyped-call]
            lambda delta: self._note_cotangents(module, delta.detach())
        )
        return started

    def _note_inputs(self, module: nn.Module, x: Tensor, positions: int) -> None:
        factors = self.recorder.factors[self.name]
        if factors.weight:
            vectors = split_inputs(module, x, positions)
        else:
            vectors = x.new_zeros(len(x), getattr(module, "groups", 1), positions, 0)
        vectors = by_sample(vectors, self.recorder.batch)
        if factors.bias:
            vectors = torch.cat([vectors, vectors.new_ones(*vectors.shape[:-1], 1)], -1)
        if self.recorder.form == "reduce":
            vectors = vectors.mean(2, keepdim=True)
        factors.inputs += _second_moment(vectors)
        self.recorder.calls[self.name] += 1

    def _note_cotangents(self, module: nn.Module, delta: Tensor) -> None:
        vectors = by_sample(split_outputs(module, delta), self.recorder.batch)
        reduce = self.recorder.form == "reduce"
        moment = _second_moment(vectors.sum(2, keepdim=True) if reduce else vectors)
        self.recorder.factors[self.name].outputs += moment if reduce else moment / vectors.shape[2]


def _empty_factors(module: nn.Module, name: str, weight: bool, bias: bool) -> KroneckerFactors:
    matrix = module.get_parameter("weight")
    groups = int(getattr(module, "groups", 1))
    dtype = matrix.dtype if matrix.dtype == torch.float64 else torch.float32
    width, channels = weight * matrix[0].numel() + bias, len(matrix) // groups
    return KroneckerFactors(
        _join(name, "weight") if weight else None,
        _join(name, "bias") if bias else None,
        torch.zeros(groups, width, width, dtype=dtype, device=matrix.device),
        torch.zeros(groups, channels, channels, dtype=dtype, device=matrix.device),
    )


def _join(name: str, key: str) -> str:
    return f"{name}.{key}" if name else key
