"""Numbers per sample that batches of all processes add up to."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lqf_lightning.linear import current_reducer


@dataclass(frozen=True)
class SampleColumns:
    """What a `SampleLedger` holds of all processes.

    Attributes:
        columns: Name to values by index (N,), float32; NaN for samples that nothing was noted of.
        count: How often each sample was noted (N,), float32.
    """

    columns: Mapping[str, Tensor]
    count: Tensor

    def __getitem__(self, name: str) -> Tensor:
        """Look up a column.

        Args:
            name: Its name.

        Returns:
            Values by index (N,).
        """
        return self.columns[name]

    def to(self, device: torch.device | str) -> "SampleColumns":
        """The same numbers elsewhere.

        Args:
            device: Where.

        Returns:
            The columns there.
        """
        return SampleColumns({name: values.to(device) for name, values in self.columns.items()}, self.count.to(device))


class SampleLedger:
    """Named columns keyed by the index of the manifest, each the mean of what was noted of a sample.

    Every process notes the samples of its own batches, without a word to the others. `reduce` adds up sums and counts
    over processes and divides, so that a sample that two processes have seen, as padded samplers make them, counts once
    and with the mean of its values; summing values alone would double it. It takes 4 bytes per sample and column.

    Args:
        size: Number of rows N of the manifest.
        columns: Names of the columns.
        device: Where batches are.

    Example:
        >>> import torch
        >>> ledger = SampleLedger(3, ["loss"])
        >>> ledger.add(torch.tensor([2, 0, 2]), loss=torch.tensor([1.0, 5.0, 3.0]))
        >>> ledger.reduce()["loss"].tolist()
        [5.0, nan, 2.0]
    """

    def __init__(self, size: int, columns: Sequence[str], device: torch.device | str = "cpu") -> None:
        self.columns = tuple(columns)
        self._sums = torch.zeros(size, len(self.columns) + 1, device=device)  # the last column counts

    def add(self, index: Tensor, **values: Tensor) -> None:
        """Note samples of this process; nothing waits for the device.

        Args:
            index: Rows of the manifest (B,), in any order and possibly repeated.
            **values: Every column (B,).

        Raises:
            ValueError: Columns are missing or unknown.
        """
        if set(values) != set(self.columns):
            raise ValueError(f"a ledger of {', '.join(self.columns)} got {', '.join(sorted(values)) or 'nothing'}")
        parts = [values[name].to(self._sums) for name in self.columns]
        rows = torch.stack([*parts, self._sums.new_ones(len(index))], 1)
        self._sums.index_add_(0, index.to(self._sums.device), rows)

    def reduce(self) -> SampleColumns:
        """Bring the numbers of all processes together; every process has to call it. The ledger stays as it is.

        Returns:
            The mean per sample, the same on every process.
        """
        total = self._total()
        count = total[:, -1]
        means = (total[:, :-1] / count.unsqueeze(1)).T
        return SampleColumns(dict(zip(self.columns, means, strict=True)), count)

    def clear(self) -> None:
        """Forget what was noted."""
        self._sums.zero_()

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs, complete on every process; every process has to call it.

        Returns:
            A tensor and plain values.
        """
        return {"columns": list(self.columns), "sums": self._total().cpu()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint, on any number of processes: the first one takes what all had noted.

        Args:
            state: What `state` returned, perhaps for a manifest to which samples have been added since.

        Raises:
            ValueError: Columns differ, or there were more samples.
        """
        sums: Tensor = state["sums"]
        if tuple(state["columns"]) != self.columns or len(sums) > len(self._sums):
            raise ValueError(
                f"the checkpoint holds {', '.join(state['columns'])} of {len(sums)} samples; expected "
                f"{', '.join(self.columns)} of at most {len(self._sums)}. Set ckpt_path=null to start over"
            )
        self._sums.zero_()
        if current_reducer().rank == 0:
            self._sums[: len(sums)] = sums.to(self._sums)

    def _total(self) -> Tensor:
        return current_reducer().sum_(self._sums.clone())
