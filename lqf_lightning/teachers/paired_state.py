"""The tensors of a network beside those of its copy, by name."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lqf_lightning.linear import current_reducer
from lqf_lightning.teachers.teacher import wide_type


@dataclass(frozen=True)
class Pairs:
    """Tensors to be changed, and tensors of the same shapes that they follow.

    Attributes:
        own: The ones to be changed, in place.
        other: The ones to follow.
    """

    own: list[Tensor]
    other: list[Tensor]

    def average(self, share: float) -> None:
        """``own <- own + share (other - own)``, all in one call; a share of 1 copies.

        Args:
            share: Weight of the other tensors, in [0, 1].
        """
        if share == 1:
            self.copy()
        elif self.own:
            same = [o if o.dtype == t.dtype else o.to(t.dtype) for t, o in zip(self.own, self.other, strict=True)]
            torch._foreach_lerp_(self.own, same, share)

    def copy(self) -> None:
        """``own <- other``."""
        if self.own:
            torch._foreach_copy_(self.own, self.other)

    def over_ranks(self) -> "Pairs":
        """The same, where the other tensors are means over all processes, by one collective call.

        Returns:
            Pairs with the same tensors to be changed.
        """
        reducer = current_reducer()
        if reducer.world_size == 1 or not self.other:
            return self
        wide = [tensor.to(wide_type(tensor.dtype)).flatten() for tensor in self.other]
        flat = reducer.sum_(torch.cat(wide)) / reducer.world_size
        parts = torch.split(flat, [tensor.numel() for tensor in self.other])
        return Pairs(self.own, [part.view_as(tensor) for part, tensor in zip(parts, self.other, strict=True)])


@dataclass(frozen=True)
class PairedState:
    """All tensors of two state dicts, every tensor once however many names it has.

    Attributes:
        weights: Floating-point parameters.
        statistics: Floating-point buffers: running means and variances of batch norm.
        integers: The rest: counters.
    """

    weights: Pairs
    statistics: Pairs
    integers: Pairs


def pair_states(copied: nn.Module, original: nn.Module) -> PairedState:
    """Pair the entries of two state dicts by name.

    Args:
        copied: The network whose tensors are to be changed.
        original: The network that it follows.

    Returns:
        The pairs.

    Raises:
        ValueError: Names or shapes differ, or tensors that are shared in the copied network are not in the original.
    """
    own, other = _tensors(copied), _tensors(original)
    wrong = sorted(own.keys() ^ other.keys())
    followed: dict[Tensor, Tensor] = {}  # every tensor once, however many names it has
    for name, tensor in own.items():
        partner = other.get(name, tensor)
        if tensor.shape != partner.shape:
            wrong.append(f"{name} {tuple(tensor.shape)} against {tuple(partner.shape)}")
        elif followed.setdefault(tensor, partner) is not partner:
            wrong.append(f"{name}, which was one tensor with another entry")
    if wrong:
        raise ValueError(
            f"the student is no longer the network that its teacher was copied from: {len(wrong)} entries of their "
            f"state dicts differ: {', '.join(wrong[:5])}. Build the EMANTeacher after the last change of layers"
        )
    kinds = Pairs([], []), Pairs([], []), Pairs([], [])
    for tensor, partner in followed.items():
        kind = kinds[_kind(tensor)]
        kind.own.append(tensor)
        kind.other.append(partner)
    return PairedState(*kinds)


def _kind(tensor: Tensor) -> int:
    if not (tensor.is_floating_point() or tensor.is_complex()):
        return 2
    return 0 if isinstance(tensor, nn.Parameter) else 1


def _tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value for name, value in module.state_dict(keep_vars=True).items() if isinstance(value, Tensor)}
