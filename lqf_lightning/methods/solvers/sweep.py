"""Passes over training samples that apply the Jacobian at the pre-trained weights, batch by batch."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lqf_lightning.linear import FoldedJacobian, LinearizedModel, exactly


class PushSweep:
    """`J v` of this rank's samples.

    Args:
        model: The linearized model.
        direction: v by parameter name; what is left out does not move.
    """

    def __init__(self, model: LinearizedModel, direction: Mapping[str, Tensor]) -> None:
        self.model, self.direction = model, direction
        self._jacobian: FoldedJacobian | None = None
        self._tangents: dict[str, Tensor] = {}
        self._rows: list[Tensor] = []

    def take(self, images: Tensor) -> None:
        """Go on with the next batch.

        Args:
            images: Inputs (B, ...), B may be 0.
        """
        if not len(images):
            return
        with exactly(images.device, False):
            if self._jacobian is None:  # directions are folded once for all batches
                self._jacobian = FoldedJacobian(self.model, images)
                (self._tangents,) = self._jacobian.fold([self.direction])
            self._rows.append(self._jacobian.push(images, self._tangents).double())

    def result(self, outputs: int) -> Tensor:
        """The rows of all batches.

        Args:
            outputs: C, which a rank without samples cannot know.

        Returns:
            `J v` (n_local, C), double precision.
        """
        device = next(iter(self.model.deltas.values())).device
        return torch.cat([torch.zeros(0, outputs, dtype=torch.float64, device=device), *self._rows])


class PullSweep:
    """`J^T r` for one or more right-hand sides, summed over this rank's samples.

    Args:
        model: The linearized model.
        *sides: r (n_local, C), in the order of the batches.
    """

    def __init__(self, model: LinearizedModel, *sides: Tensor) -> None:
        self.model, self.sides = model, sides
        self._jacobian: FoldedJacobian | None = None
        self._done = 0

    def take(self, images: Tensor) -> None:
        """Go on with the next batch.

        Args:
            images: Inputs (B, ...), B may be 0.
        """
        if not len(images):
            return
        own = slice(self._done, self._done + len(images))
        self._done = own.stop
        with exactly(images.device, True):
            self._jacobian = self._jacobian or FoldedJacobian(self.model, images)
            self._jacobian.pull(images, [side[own] for side in self.sides])

    def result(self) -> list[dict[str, Tensor]]:
        """The sums over all batches.

        Returns:
            `J^T r` by parameter name, zeros without samples, for every right-hand side.
        """
        if self._jacobian is None:
            return [{n: torch.zeros_like(d) for n, d in self.model.deltas.items()} for _ in self.sides]
        return self._jacobian.pulled()
