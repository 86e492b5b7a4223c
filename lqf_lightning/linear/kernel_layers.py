r"""The layers of a network as the tangent kernel sees them: sizes, costs, and what each choice follows from.

For one sample, the gradient of a dense or convolutional layer under the cotangent of output c is
:math:`\sum_t \delta_{ct} a_t^T` over the T positions, with d inputs and o outputs per position. The inner products of
two samples follow either from these *explicit* rows, at :math:`C^2 o d` multiplications, or, without ever forming
them, from :math:`\sum_{ts} (a_t \cdot a'_s)(\delta_{ct} \cdot \delta'_{c's})`, which takes, summed over s first,
:math:`T^2 (d + C o) + C^2 T o` (Fast Finite Width NTK, arXiv 2206.08720, calls these structured derivatives).
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from lqf_lightning.linear.affine_norm import AffineNorm
from lqf_lightning.linear.batch_norm import is_batch_norm
from lqf_lightning.linear.kernel import KernelForm
from lqf_lightning.linear.outer_products import is_kronecker_layer

Kind = Literal["outer", "norm", "rest"]
Gram = Literal["explicit", "ghost"]

# Multiplications that cost as much as touching one more number in memory.
_TOUCH = 16.0


@dataclass(frozen=True)
class KernelLayer:
    """Parameters whose part of the kernel is computed together, or a range of their outputs.

    Attributes:
        group: Layer group that they belong to.
        module: Module that owns them.
        weight: Name of the weight; None if it stays out. For kind "rest" the one parameter.
        bias: Name of the bias; None if it stays out.
        kind: "outer" sums outer products of inputs and cotangents, "norm" scales and shifts normalized inputs, "rest"
            is any other parameter.
        calls: How often the module runs.
        windows: How many parts of a sample the leading dimension of its input holds.
        inputs: Shape of one of these parts.
        positions: T.
        width: d, one more if the bias is trained.
        channels: Outputs per position, over all groups of a convolution; columns of a row for other kinds.
        blocks: Groups of a convolution.
        gram: How inner products are taken.
        rows: Whether rows are kept rather than inputs and cotangents.
        start: First channel.
        stop: Channel behind the last.
    """

    group: str
    module: str
    weight: str | None
    bias: str | None
    kind: Kind
    calls: int = 1
    windows: int = 1
    inputs: tuple[int, ...] = ()
    positions: int = 1
    width: int = 1
    channels: int = 1
    blocks: int = 1
    gram: Gram = "explicit"
    rows: bool = True
    start: int = 0
    stop: int = 1

    @property
    def parameters(self) -> tuple[str, ...]:
        """Names of the parameters."""
        return tuple(name for name in (self.weight, self.bias) if name is not None)

    @property
    def columns(self) -> int:
        """Length of a row."""
        return (self.stop - self.start) * self.width

    @property
    def input_numbers(self) -> int:
        """Numbers that the inputs of one sample take."""
        return self.windows * math.prod(self.inputs)

    def numbers(self, cotangents: int) -> int:
        """Count what is kept of one sample.

        Args:
            cotangents: Number of cotangents.

        Returns:
            Numbers, not bytes.
        """
        if self.rows:
            return cotangents * self.columns
        return self.input_numbers + cotangents * (self.stop - self.start) * self.positions

    def passing_numbers(self, cotangents: int) -> int:
        """Count what is kept of one sample until its rows have been formed.

        Args:
            cotangents: Number of cotangents.

        Returns:
            Numbers, not bytes; none if rows are not formed at once.
        """
        if self.kind != "outer" or not self.rows:
            return 0
        return self.calls * (self.input_numbers + cotangents * (self.stop - self.start) * self.positions)

    def choose(self, form: KernelForm, cotangents: int, samples: int) -> "KernelLayer":
        """Decide between explicit and ghost inner products, and what is kept for them.

        Args:
            form: Form of the kernel.
            cotangents: Number of cotangents C.
            samples: Number of training samples, over which the cost of forming rows is spread.

        Returns:
            The layer with its choices made.
        """
        if form == "last_layer":
            return replace(self, gram="ghost", rows=False)
        if self.kind != "outer" or self.calls > 1:
            return replace(self, gram="explicit", rows=True)
        d, o, t, c = self.width, self.channels // self.blocks, self.positions, cotangents
        coupled = c if form == "full" else 1
        explicit = c * coupled * o * d + 2 * c * t * o * d / samples
        if t == 1:
            ghost = d + c * coupled * o + _TOUCH * c * coupled
        else:
            ghost = t * t * (d + c * o) + c * coupled * t * o + 2 * _TOUCH * c * t * o
        if ghost < explicit and self.blocks == 1:
            return replace(self, gram="ghost", rows=False)
        rows = c * self.channels * d <= self.input_numbers + c * self.channels * t
        return replace(self, gram="explicit", rows=rows)

    def split(self, numbers: int, cotangents: int) -> list["KernelLayer"]:
        """Cut the layer by output channels, over which inner products are sums.

        Args:
            numbers: What may be kept per sample.
            cotangents: Number of cotangents.

        Returns:
            Parts that keep no more, or the layer itself if it does not.

        Raises:
            ValueError: A single channel keeps more.
        """
        whole, step = self.stop - self.start, self.channels // self.blocks if self.blocks > 1 else 1
        fixed = 0 if self.rows else self.input_numbers
        size = min(whole, int((numbers - fixed) * whole // max(self.numbers(cotangents) - fixed, 1))) // step * step
        if size < 1:
            raise ValueError(
                f"a single channel of {self.parameters[0]!r} needs {fixed + self.numbers(cotangents) // whole} numbers "
                f"per sample, and the budget has room for {numbers}. Raise the budget, or take fewer samples"
            )
        return [replace(self, start=at, stop=min(at + size, self.stop)) for at in range(self.start, self.stop, size)]


def list_candidates(network: nn.Module, groups: Mapping[str, Iterable[str]]) -> list[KernelLayer]:
    """Find the modules whose gradients have a known structure; sizes are filled in when they run.

    Args:
        network: The network.
        groups: Parameter names by layer group.

    Returns:
        One entry per module and group.
    """
    group_of = {name: group for group, names in groups.items() for name in names}
    found = []
    for name, module in network.named_modules():
        if not (is_kronecker_layer(module) or is_plain_norm(module)):
            continue
        owned = {key: f"{name}.{key}" if name else key for key in ("weight", "bias")}
        owned = {key: full for key, full in owned.items() if full in group_of}
        for group in dict.fromkeys(group_of[full] for full in owned.values()):
            own = {key: full for key, full in owned.items() if group_of[full] == group}
            found.append(_describe(KernelLayer(group, name, own.get("weight"), own.get("bias"), "norm"), module))
    return found


def _describe(layer: KernelLayer, module: nn.Module) -> KernelLayer:
    weight = module.get_parameter("weight" if layer.weight else "bias")
    if not is_kronecker_layer(module):
        columns = weight.numel() * len(layer.parameters)
        return replace(layer, channels=columns, stop=columns)
    width = (weight[0].numel() if layer.weight else 0) + (layer.bias is not None)
    blocks, channels = int(getattr(module, "groups", 1)), len(weight)
    return replace(layer, kind="outer", blocks=blocks, channels=channels, width=width, stop=channels)


def is_plain_norm(module: nn.Module) -> bool:
    """Tell whether a module scales and shifts a normalized input, and what comes behind that is a child.

    Args:
        module: Any module.

    Returns:
        True for batch, layer and group normalization, whose claim is checked against a gradient before it is used.
    """
    if isinstance(module, _BatchNorm):
        return is_batch_norm(module)
    return isinstance(module, (AffineNorm, nn.LayerNorm, nn.GroupNorm))
