"""Activations on the way from one function to another."""

import copy

import torch
from torch import Tensor, nn


class BlendedActivation(nn.Module):
    r"""A mixture of two activations, :math:`(1 - t)\,a(x) + t\,b(x)`.

    Between ReLU and a leaky one of slope s, t is the share of the slope that is there already; between ReLU6 and a
    leaky one also the share of the way to no ceiling.

    Args:
        before: The one activation a.
        after: The other one b; neither may change its input.

    Attributes:
        share: t, 1 at first; at 1 only b is computed.

    Example:
        >>> blended = BlendedActivation(nn.ReLU(), nn.LeakyReLU(0.5))
        >>> blended.share = 0.5
        >>> blended(torch.tensor([-4.0, 4.0])).tolist()
        [-1.0, 4.0]
    """

    def __init__(self, before: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.before, self.after, self.share = before, after, 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Mix.

        Args:
            x: Any tensor.

        Returns:
            A tensor of the same shape.
        """
        after: Tensor = self.after(x)
        return after if self.share >= 1 else torch.lerp(self.before(x), after, self.share)


def blend_activations(original: nn.Module, swapped: nn.Module) -> list[BlendedActivation]:
    """Put mixtures in place of activations that were swapped; no tensor of the network changes its name.

    Args:
        original: The network before.
        swapped: Its copy with leaky activations, changed in place.

    Returns:
        The mixtures, with the share 1: the network computes what it did.
    """
    # A module that stands in several places has been swapped in each of them.
    before, mixtures = dict(original.named_modules(remove_duplicate=False)), []
    for name, leaky in list(swapped.named_modules()):
        if isinstance(leaky, nn.LeakyReLU) and not isinstance(before[name], nn.LeakyReLU):
            mixed = BlendedActivation(_pure(before[name]), _pure(leaky))
            parent, _, child = name.rpartition(".")
            setattr(swapped.get_submodule(parent), child, mixed)
            mixtures.append(mixed)
    return mixtures


def _pure(activation: nn.Module) -> nn.Module:
    found = copy.deepcopy(activation)
    found.inplace = False  # type: ignore[assignment]  # a plain attribute of torch's activations
    return found
