"""What the answers to some queries tell about a movement of noisy weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.data import Batch
from lqf_lightning.linear import assemble_kernel, current_reducer
from lqf_lightning.linear.jacobian import push_batch
from lqf_lightning.methods import LQF

_ROWS = 4000  # answers of a query set, outputs counting, whose kernel is decomposed
_CHUNK = 64  # images in flight


@dataclass(frozen=True)
class QuerySet:
    r"""Images that a model with noisy weights is asked about, and how its answers vary.

    Noise of deviation sigma on all weights, intercept included, varies the answers by :math:`\sigma^2 J J^T`, and a
    movement d of the weights by :math:`J d`; :math:`\frac{1}{2 \sigma^2} (J d)^T (J J^T)^+ J d` nats are what all
    answers together tell of it, never more than :math:`|d|^2 / 2 \sigma^2`. Directions in which rounding outweighs
    :math:`J J^T` are left out, which can only lower the result.

    Attributes:
        images: Inputs (q, ...), the same on every rank.
        index: Their index in the manifest (q,).
        values: Eigenvalues of `J J^T` that are kept (r,), positive.
        vectors: Their eigenvectors (q C, r).
    """

    images: Tensor
    index: Tensor
    values: Tensor
    vectors: Tensor

    @classmethod
    def of(cls, method: LQF, images: Tensor, index: Tensor) -> "QuerySet":
        """Take the kernel among some images, intercept included, and decompose it.

        Args:
            method: The method.
            images: Inputs (q, ...), the same on every rank.
            index: Their index in the manifest (q,).

        Returns:
            The queries.
        """
        model = method.linearized
        kernel = assemble_kernel(model, {"all": list(model.deltas)}, torch.split(images, _CHUNK)).train
        values, vectors = torch.linalg.eigh(kernel.total()[0])
        rounding = 8 * len(values) * torch.finfo(images.dtype).eps * float(values[-1])
        kept = values > rounding
        return cls(images, index, values[kept], vectors[:, kept])

    def information(self, method: LQF, changes: Mapping[str, Mapping[str, Tensor]], sigma: float) -> dict[str, float]:
        """What the answers tell of several movements.

        Args:
            method: The method.
            changes: Movements of all trained parameters, by any name.
            sigma: Deviation of the noise on the weights.

        Returns:
            Nats by that name.
        """
        listed = list(changes.values())
        parts = [torch.stack(push_batch(method.linearized, part, listed)) for part in torch.split(self.images, _CHUNK)]
        moved = torch.cat(parts, 1).double().flatten(1)  # (changes, q C), ordered as the kernel's rows
        told = (moved @ self.vectors).square() / self.values
        return dict(zip(changes, (0.5 * told.sum(1) / sigma**2).tolist(), strict=True))


def spread_evenly(index: Tensor, number: int, outputs: int) -> Tensor:
    """Choose queries evenly among samples in their order, files of a class lying together.

    Args:
        index: Index of the samples (n,), ascending.
        number: How many are wanted; fewer are taken of a small set, or of a model with many outputs.
        outputs: Number of outputs C.

    Returns:
        Index of the queries (q,), ascending.

    Example:
        >>> import torch
        >>> spread_evenly(torch.tensor([3, 5, 8, 9, 12]), 3, 10).tolist()
        [3, 8, 12]
    """
    number = min(len(index), number, max(1, _ROWS // outputs))
    return index[torch.linspace(0, len(index) - 1, number, dtype=torch.float64).round().long().to(index.device)]


def gather_images(wanted: Tensor, batches: Iterable[Batch]) -> Tensor:
    """Bring images of all ranks to all of them.

    Args:
        wanted: Index of the images (q,), ascending.
        batches: Samples of this rank, at least one batch, which may be empty.

    Returns:
        Inputs (q, ...).
    """
    images, index = [], []
    for batch in batches:
        chosen = torch.isin(batch.index, wanted.to(batch.index.device))
        images.append(batch.input[chosen])
        index.append(batch.index[chosen])
    return current_reducer().gather_rows(torch.cat(images), torch.cat(index))[0]
