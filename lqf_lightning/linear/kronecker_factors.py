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
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

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


def is_kronecker_layer(module: nn.Module) -> bool:
    """Tell whether the gradient of a module is a sum of outer products of inputs and cotangents.

    Args:
        module: Any module.

    Returns:
        True for `Linear`, `Conv2d`, and timm's `Conv2dSame`, which only pads in another way. Not for subclasses that
        transform their weight, nor for the output layer of `nn.MultiheadAttention`, which never runs as a module.
    """
    name, run = type(module).__name__, type(module).forward
    if isinstance(module, nn.Linear):
        return run is nn.Linear.forward and name != "NonDynamicallyQuantizableLinear"
    return isinstance(module, nn.Conv2d) and (run is nn.Conv2d.forward or name == "Conv2dSame")


def split_inputs(module: nn.Module, x: Tensor, positions: int) -> Tensor:
    """Cut the input of a layer into the vectors that its weight multiplies.

    Args:
        module: `Linear` or `Conv2d`.
        x: Input (B, ..., d) or (B, C, H, W).
        positions: Number of output positions.

    Returns:
        Vectors (B, groups, T, d).

    Raises:
        ValueError: If the convolution pads in an unknown way.
    """
    if not isinstance(module, nn.Conv2d):
        return x.reshape(len(x), 1, -1, x.shape[-1])
    own = type(module).forward is nn.Conv2d.forward
    padding = list(module._reversed_padding_repeated_twice) if own else _same_padding(module, x)
    mode = "constant" if module.padding_mode == "zeros" else module.padding_mode
    patches = F.unfold(F.pad(x, padding, mode), module.kernel_size, module.dilation, 0, module.stride)
    if patches.shape[-1] != positions:
        raise ValueError(f"cannot tell the padding of {type(module).__name__} for inputs {tuple(x.shape)}")
    return patches.reshape(len(x), module.groups, -1, positions).transpose(2, 3)


def _same_padding(module: nn.Conv2d, x: Tensor) -> list[int]:
    # TensorFlow's rule, which timm's Conv2dSame follows: as many outputs as strides fit, the odd pixel behind.
    padding: list[int] = []
    for axis in (1, 0):
        size, stride = x.shape[2 + axis], module.stride[axis]
        span = (module.kernel_size[axis] - 1) * module.dilation[axis] + 1
        total = max((math.ceil(size / stride) - 1) * stride + span - size, 0)
        padding += [total // 2, total - total // 2]
    return padding


def split_outputs(module: nn.Module, delta: Tensor) -> Tensor:
    """Bring the cotangents of a layer's output into the order of `split_inputs`.

    Args:
        module: `Linear` or `Conv2d`.
        delta: Cotangents (B, ..., o) or (B, C, H, W).

    Returns:
        Cotangents (B, groups, T, o).
    """
    if not isinstance(module, nn.Conv2d):
        return delta.reshape(len(delta), 1, -1, delta.shape[-1])
    groups = module.groups
    return delta.reshape(len(delta), groups, delta.shape[1] // groups, -1).transpose(2, 3)


def _by_sample(vectors: Tensor, batch: int) -> Tensor:
    # Window attention folds windows into the leading dimension: (B W, groups, T, d) -> (B, groups, W T, d).
    windows, rest = divmod(len(vectors), max(batch, 1))
    if windows <= 1 or rest:
        return vectors
    folded = vectors.reshape(batch, windows, *vectors.shape[1:])
    return folded.transpose(1, 2).flatten(2, 3)


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
        vectors = _by_sample(vectors, self.recorder.batch)
        if factors.bias:
            vectors = torch.cat([vectors, vectors.new_ones(*vectors.shape[:-1], 1)], -1)
        if self.recorder.form == "reduce":
            vectors = vectors.mean(2, keepdim=True)
        factors.inputs += _second_moment(vectors)
        self.recorder.calls[self.name] += 1

    def _note_cotangents(self, module: nn.Module, delta: Tensor) -> None:
        vectors = _by_sample(split_outputs(module, delta), self.recorder.batch)
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
