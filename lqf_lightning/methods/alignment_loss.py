"""What re-aligning a network with another one minimizes."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class AlignmentLoss:
    r"""Distance of a network from its original on a batch, by what leaves their layer groups.

    .. math:: a\,E(\phi) + \frac{b}{G} \sum_g E(\phi_g) + c\,T^2\,\mathrm{KL}(p^0 \,\|\, p)

    with :math:`\phi_g` what leaves layer group g (averaged over places), :math:`\phi` what enters the head, p the
    softmax of the outputs at temperature T, a 0 for the original, and E the `relative_error`.

    Attributes:
        feature_weight: a.
        group_weight: b.
        logit_weight: c.
        temperature: T.
    """

    feature_weight: float = 1.0
    group_weight: float = 1.0
    logit_weight: float = 1.0
    temperature: float = 1.0

    def __call__(self, found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> Tensor:
        """Compare.

        Args:
            found: What leaves each layer group (B, D_g), in forward order; the last are the outputs (B, C).
            expected: The same of the original.

        Returns:
            A scalar.
        """
        *groups, last, head = expected
        loss = self.feature_weight * relative_error(found[last], expected[last])
        if self.group_weight and groups:
            errors = [relative_error(found[group], expected[group]) for group in groups]
            loss = loss + self.group_weight * torch.stack(errors).mean()
        if self.logit_weight:
            ours, theirs = (F.log_softmax(f[head].float() / self.temperature, 1) for f in (found, expected))
            divergence = F.kl_div(ours, theirs, reduction="batchmean", log_target=True)
            loss = loss + self.logit_weight * self.temperature**2 * divergence
        return loss


def relative_error(found: Tensor, expected: Tensor) -> Tensor:
    r"""What one set of features leaves unexplained of another's spread over the batch.

    .. math:: \frac{\sum_i \lVert \phi_i - \phi^0_i \rVert^2}{\sum_i \lVert \phi^0_i - \bar\phi^0 \rVert^2}

    Args:
        found: Features (B, F).
        expected: Those of the original (B, F).

    Returns:
        A scalar; 0 where they are the same, 1 where every row of `found` is the mean of `expected`.

    Example:
        >>> relative_error(torch.tensor([[0.0], [1.0]]), torch.tensor([[0.0], [2.0]])).item()
        0.5
    """
    found, expected = found.float(), expected.float()
    spread = (expected - expected.mean(0)).square().sum()
    return (found - expected).square().sum() / spread.clamp(min=torch.finfo(torch.float32).tiny)
