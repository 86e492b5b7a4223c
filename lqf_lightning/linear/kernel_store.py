"""Finished parts of a kernel, kept so that an interrupted assembly goes on where it stopped."""

from collections.abc import Iterable, MutableMapping
from dataclasses import dataclass

import torch
from torch import Tensor

_ODD = 0x9E3779B97F4A7C15 - 2**64


def checksum(rows: Tensor) -> Tensor:
    """Sum up the content of every row in whole numbers, which add up exactly in any order.

    Args:
        rows: Anything (B, ...).

    Returns:
        Numbers (B,), int64.

    Example:
        >>> import torch
        >>> a, b, c = checksum(torch.tensor([[1.0, 2.0], [2.0, 1.0], [1.0, 2.0]])).tolist()
        >>> a == c, a == b
        (True, False)
    """
    flat = rows.detach().reshape(len(rows), -1)
    words = flat.double().contiguous().view(torch.int64) if flat.is_floating_point() else flat.long()
    place = torch.arange(1, words.shape[1] + 1, device=rows.device)
    # Neither a sum nor a product of the two alone: exchanged and scaled entries must not cancel.
    mixed = (words ^ (words >> 29)) * (place * _ODD | 1)
    return (mixed ^ (mixed >> 32)).sum(1)


def checksum_of(tensors: Iterable[Tensor]) -> int:
    """Sum up the content of several tensors, order included.

    Args:
        tensors: The tensors.

    Returns:
        One number.
    """
    sums = [checksum(tensor.reshape(1, -1)).cpu() for tensor in tensors if tensor.numel()]
    return int(checksum(torch.stack(sums, 1))) if sums else 0


@dataclass(frozen=True)
class KernelStore:
    """Matrices by layer group, under keys that say what they are of.

    Attributes:
        entries: Where they are kept.
        fingerprint: What a matrix depends on besides its group: form, shape, weights and samples.
    """

    entries: MutableMapping[str, Tensor]
    fingerprint: str

    def key(self, group: str, part: str) -> str:
        """The key of a matrix.

        Args:
            group: Layer group.
            part: "train" or "cross".

        Returns:
            `group:part:fingerprint`.
        """
        return f"{group}:{part}:{self.fingerprint}"

    def find(self, group: str, part: str) -> Tensor | None:
        """Look a matrix up.

        Args:
            group: Layer group.
            part: "train" or "cross".

        Returns:
            The matrix, or None if it has not been finished.

        Raises:
            ValueError: There is one of the same group, of another kernel.
        """
        start = f"{group}:{part}:"
        others = [key for key in self.entries if key.startswith(start) and key != self.key(group, part)]
        if others:
            raise ValueError(
                f"the store holds {others[0]!r}, which is another kernel than {self.key(group, part)!r} (form, shape, "
                "type, and checksum of names, weights and samples). Give an empty store, or the one that belongs to it"
            )
        return self.entries.get(self.key(group, part))

    def put(self, group: str, part: str, matrix: Tensor) -> None:
        """Keep a matrix.

        Args:
            group: Layer group.
            part: "train" or "cross".
            matrix: The matrix.
        """
        self.entries[self.key(group, part)] = matrix
