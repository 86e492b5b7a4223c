"""How far a network is from another one that it should compute the same as."""

import torch
from torch import Tensor
from torchmetrics import Metric


class AlignmentGap(Metric):
    r"""Relative error of features, and agreement of the classes that two networks name, over all samples and ranks.

    The error is what the one network's features leave unexplained of the other's,

    .. math:: \frac{\sum_i \lVert \phi_i - \phi^0_i \rVert^2}{\sum_i \lVert \phi^0_i - \bar\phi^0 \rVert^2},

    0 for the same features, 1 for features that are no better than the original's mean, and above where they are worse.

    Args:
        features: Number of features F.
        head: Whether the outputs mean something, so that agreement can be told.

    Example:
        >>> gap = AlignmentGap(1, head=True)
        >>> original, now = torch.tensor([[0.0], [2.0]]), torch.tensor([[0.0], [1.0]])
        >>> gap.update(now, original, torch.tensor([[3.0, 1.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [1.0, 0.0]]))
        >>> {name: value.item() for name, value in gap.compute().items()}
        {'feature_error': 0.5, 'agreement': 0.5}
    """

    squared: Tensor
    norm: Tensor
    total: Tensor
    agreed: Tensor
    count: Tensor

    def __init__(self, features: int, *, head: bool) -> None:
        super().__init__()
        self.head = head
        sizes: dict[str, tuple[int, ...]] = {"squared": (), "norm": (), "total": (features,), "agreed": (), "count": ()}
        for name, size in sizes.items():
            self.add_state(name, torch.zeros(size, dtype=torch.float64), dist_reduce_fx="sum")

    def update(self, features: Tensor, original: Tensor, logits: Tensor, expected: Tensor) -> None:
        """Add a batch, of no samples too.

        Args:
            features: Features (B, F).
            original: Those of the original (B, F).
            logits: Outputs (B, C).
            expected: Those of the original (B, C).
        """
        ours, theirs = features.double(), original.double()
        self.squared += (ours - theirs).square().sum()
        self.norm += theirs.square().sum()
        self.total += theirs.sum(0)
        self.agreed += (logits.argmax(1) == expected.argmax(1)).sum()
        self.count += len(ours)

    def compute(self) -> dict[str, Tensor]:
        """The figures of all samples of all ranks.

        Returns:
            `feature_error`, and with a head `agreement`: the share of samples of which both name the same class.
        """
        spread = self.norm - self.total.square().sum() / self.count
        figures = {"feature_error": (self.squared / spread).float()}
        return figures | ({"agreement": (self.agreed / self.count).float()} if self.head else {})
