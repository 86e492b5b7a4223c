"""How soon and how lastingly each sample was learned: what one run tells about how typical it is."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_SUMS = ("correct", "confidence", "top_confidence", "margin", "loss")
_UNKNOWN = -1


class LearningHistory:
    r"""Adds up per-epoch columns to scores per sample, in some 37 bytes of each.

    - Cumulative correctness :math:`\frac1T \sum_t 1[\hat y_t = y]`, the best cheap proxy of the C-score (Jiang et al.
      2021): how often models that have not seen a sample get it right. Low: mislabeled or
      atypical.
    - Cumulative confidence, the same of :math:`p_t(y)`; of :math:`\max_c p_t(c)`, which needs no label and tells less;
      and the mean margin.
    - Forgetting events (Toneva et al. 2019): epochs in which a sample is wrong that was right when last seen.

    A sample that comes several times in an epoch is right if it is so in more than half of its appearances. Epochs in
    which a sample did not come do not count for it.

    Args:
        size: Number of samples N.

    Example:
        >>> import torch
        >>> history = LearningHistory(1)
        >>> for epoch, right in enumerate([0.0, 1.0, 0.0, 1.0]):
        ...     column = torch.tensor([right])
        ...     others = dict.fromkeys(["confidence", "top_confidence", "margin", "loss"], torch.ones(1))
        ...     history.observe(epoch, {"correct": column, **others})
        >>> scores = history.scores()
        >>> [scores[name].item() for name in ("cumulative_correctness", "forgetting_events", "first_learned")]
        [0.5, 1, 1]
    """

    def __init__(self, size: int) -> None:
        self._entries = {
            "sums": torch.zeros(size, len(_SUMS)),
            "last_loss": torch.full((size,), torch.nan),
            "last_right": torch.full((size,), _UNKNOWN, dtype=torch.int8),
            "epochs": torch.zeros(size, dtype=torch.int32),
            "events": torch.zeros(size, dtype=torch.int32),
            "first": torch.full((size,), _UNKNOWN, dtype=torch.int32),
        }

    @property
    def empty(self) -> bool:
        """Whether no epoch has been observed."""
        return not bool(self._entries["epochs"].any())

    def observe(self, epoch: int, columns: Mapping[str, Tensor]) -> None:
        """Add an epoch.

        Args:
            epoch: Its number.
            columns: `correct` (share of its appearances in which a sample was right), `confidence`, `top_confidence`,
                `margin` and `loss` by sample (N,); NaN where a sample did not come.
        """
        entries, seen = self._entries, ~columns["correct"].isnan()
        right = columns["correct"] > 0.5
        rows = torch.stack([columns[name] for name in _SUMS], 1).to(entries["sums"])
        entries["sums"] += torch.where(seen.unsqueeze(1), rows, 0.0)
        entries["last_loss"] = torch.where(seen, columns["loss"].to(entries["last_loss"]), entries["last_loss"])
        entries["events"] += seen & ~right & (entries["last_right"] == 1)
        entries["last_right"] = torch.where(seen, right.to(torch.int8), entries["last_right"])
        entries["first"][seen & right & (entries["first"] == _UNKNOWN)] = epoch
        entries["epochs"] += seen

    def scores(self) -> dict[str, Tensor]:
        """What the epochs so far add up to.

        Returns:
            By sample (N,): `epochs` in which it came; `cumulative_correctness`, `cumulative_confidence`,
            `cumulative_top_confidence`, `mean_margin` and `mean_loss` over these, NaN if there are none; `final_loss`,
            `final_correct` (1, 0, or -1 if it never came); `forgetting_events`; `first_learned`, the first epoch in
            which it was right, -1 if there is none; and `never_learned`, true where it came and was never right, so
            that it could not be forgotten either.
        """
        entries, names = self._entries, ("correctness", "confidence", "top_confidence")
        means = (entries["sums"] / entries["epochs"].unsqueeze(1)).T
        return {
            "epochs": entries["epochs"].clone(),
            **{f"cumulative_{name}": mean for name, mean in zip(names, means[:3], strict=True)},
            "mean_margin": means[3],
            "mean_loss": means[4],
            "final_loss": entries["last_loss"].clone(),
            "final_correct": entries["last_right"].clone(),
            "forgetting_events": entries["events"].clone(),
            "first_learned": entries["first"].clone(),
            "never_learned": (entries["first"] == _UNKNOWN) & (entries["epochs"] > 0),
        }

    def state(self) -> dict[str, Any]:
        """What a checkpoint needs.

        Returns:
            Tensors.
        """
        return {name: entry.clone() for name, entry in self._entries.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a checkpoint.

        Args:
            state: What `state` returned, perhaps when there were fewer samples: new ones follow at the end.

        Raises:
            ValueError: It knows more samples, or other entries.
        """
        stored = max((len(entry) for entry in state.values()), default=0)
        size = len(self._entries["epochs"])
        if set(state) != set(self._entries) or stored > size:
            raise ValueError(
                f"the checkpoint holds {', '.join(state)} of {stored} samples, expected {', '.join(self._entries)} "
                f"of at most {size}. Set ckpt_path=null to start over"
            )
        for name, entry in state.items():
            self._entries[name][: len(entry)] = entry


def learning_speed(columns: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The scores of a whole run at once, as `LearningHistory` adds them up epoch by epoch.

    Args:
        columns: As of `LearningHistory.observe`, by epoch and sample (T, N).

    Returns:
        As of `LearningHistory.scores`, each (N,).

    Example:
        >>> import torch
        >>> rows = dict.fromkeys(["correct", "confidence", "top_confidence", "margin", "loss"], torch.ones(3, 2))
        >>> learning_speed(rows)["cumulative_correctness"].tolist()
        [1.0, 1.0]
    """
    epochs, size = columns["correct"].shape
    history = LearningHistory(size)
    for epoch in range(epochs):
        history.observe(epoch, {name: rows[epoch] for name, rows in columns.items()})
    return history.scores()
