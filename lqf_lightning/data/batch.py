"""The batch that every method and callback receives."""

from typing import Any, NamedTuple

from torch import Tensor


class Batch(NamedTuple):
    """One mini-batch whose samples know their position in the manifest.

    Attributes:
        input: Images (B, 3, H, W), or a tuple of such tensors when a sample has several views.
        target: Class positions (B,), int64; -1 (`UNLABELED`) where the label is unknown or not to be used.
        index: Rows of the run's manifest (B,), int64; unique within one split. Copies of images have indices above
            them, see `CopiedDataset`.
    """

    input: Any
    target: Tensor
    index: Tensor  # type: ignore[assignment]  # hides tuple.index, which nobody needs here
