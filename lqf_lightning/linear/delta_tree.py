"""Parameters under the dotted names of another module's parameters."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class DeltaTree(nn.Module):
    """Zero parameters shaped like chosen parameters of a network, nested as they are.

    The nesting makes the state-dict keys equal to the original names, so `layer1.0.conv1.weight` here is the
    movement of `layer1.0.conv1.weight` there.
    """

    def place(self, name: str, like: Tensor) -> None:
        """Add one zero parameter.

        Args:
            name: Dotted name.
            like: Tensor that gives shape, type, device and memory format.
        """
        parent, leaf = self._descend(name)
        parent.register_parameter(leaf, nn.Parameter(torch.zeros_like(like, requires_grad=False)))

    def _descend(self, name: str) -> tuple["DeltaTree", str]:
        *path, leaf = name.split(".")
        node = self
        for part in path:
            if part not in node._modules:
                node.add_module(part, DeltaTree())
            child = node._modules[part]
            node = child if isinstance(child, DeltaTree) else node
        return node, leaf

    def slots(self, names: Iterable[str]) -> Iterator[tuple[str, "DeltaTree", str]]:
        """Say where parameters are kept, for look-ups that do not walk the tree.

        Args:
            names: Dotted names.

        Yields:
            The name, the module that owns the parameter, and its key there.
        """
        for name in names:
            yield name, *self._descend(name)
