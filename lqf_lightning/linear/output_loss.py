"""Losses as functions of the outputs, with their gradients, for training that happens in function space."""

from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor


class OutputLoss(Protocol):
    """A loss of every sample, and its gradient with respect to that sample's outputs."""

    @property
    def label(self) -> Tensor:
        """Class position of every sample (n,), by which errors are counted."""
        ...

    def value(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Loss of some samples.

        Args:
            outputs: Their outputs (B, C).
            rows: Their rows (B,).
        """
        ...

    def gradient(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Gradient of each sample's loss.

        Args:
            outputs: Their outputs (B, C).
            rows: Their rows (B,).
        """
        ...


@dataclass(frozen=True)
class SquaredOutputLoss:
    r"""Half the squared distance to targets, :math:`\frac{a_i}{2} \lVert f_i - y_i \rVert^2`.

    Attributes:
        target: y (n, C); the class of a sample is its largest.
        weight: How much each sample counts, a (n,); None means 1.

    Example:
        >>> import torch
        >>> loss, rows = SquaredOutputLoss(torch.tensor([[0.0, 4.0]])), torch.tensor([0])
        >>> outputs = torch.tensor([[3.0, 0.0]])
        >>> loss.value(outputs, rows).tolist(), loss.gradient(outputs, rows).tolist()
        ([12.5], [[3.0, -4.0]])
    """

    target: Tensor
    weight: Tensor | None = None

    @property
    def label(self) -> Tensor:
        """Class position of every sample (n,)."""
        return self.target.argmax(1)

    def value(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Loss of some samples.

        Args:
            outputs: Their outputs (B, C).
            rows: Their rows (B,).

        Returns:
            Losses (B,).
        """
        return _weighted(0.5 * (outputs - self.target[rows]).square().sum(1), self.weight, rows)

    def gradient(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Gradient of each sample's loss, `a (f - y)`.

        Args:
            outputs: Their outputs (B, C).
            rows: Their rows (B,).

        Returns:
            Gradients (B, C).
        """
        return _weighted(outputs - self.target[rows], self.weight, rows)


@dataclass(frozen=True)
class CrossEntropyOutputLoss:
    r"""Cross-entropy of class positions, :math:`-a_i \log \mathrm{softmax}(f_i)_{y_i}`, in nats.

    Attributes:
        label: Class position of every sample (n,).
        weight: How much each sample counts, a (n,); None means 1.

    Example:
        >>> import torch
        >>> loss, rows = CrossEntropyOutputLoss(torch.tensor([1])), torch.tensor([0])
        >>> loss.gradient(torch.zeros(1, 2), rows).tolist()
        [[0.5, -0.5]]
    """

    label: Tensor
    weight: Tensor | None = None

    def value(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Loss of some samples.

        Args:
            outputs: Their outputs (B, C).
            rows: Their rows (B,).

        Returns:
            Losses (B,).
        """
        return _weighted(F.cross_entropy(outputs, self.label[rows], reduction="none"), self.weight, rows)

    def gradient(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Gradient of each sample's loss, `a (softmax(f) - e_y)`.

        Args:
            outputs: Their outputs (B, C).
            rows: Their rows (B,).

        Returns:
            Gradients (B, C).
        """
        return _weighted(torch.softmax(outputs, 1) - F.one_hot(self.label[rows], outputs.shape[1]), self.weight, rows)


def _weighted(values: Tensor, weight: Tensor | None, rows: Tensor) -> Tensor:
    return values if weight is None else values * weight[rows].reshape(-1, *[1] * (values.dim() - 1))
