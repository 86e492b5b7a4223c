r"""Matching the outputs of an old model exactly: a change of targets and sample weights, nothing else.

With a squared loss, logit matching (Yan et al., Positive-Congruent Training, CVPR 2021, eqs. 5, 6 and 9) adds
:math:`\frac{1}{2n} \sum_i F_i \lVert f_i - z_i \rVert^2` to
:math:`\frac{1}{2n} \sum_i \lVert f_i - y_i \rVert^2`. Up to a constant the sum is
:math:`\frac{1}{2n} \sum_i a_i \lVert f_i - t_i \rVert^2` with :math:`a_i = 1 + F_i` and
:math:`t_i = (y_i + F_i z_i) / a_i`: the same linear-quadratic problem, which the same solvers solve.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class MatchedTargets:
    """Label targets and reference in one.

    Attributes:
        target: t (n, C), between the label's target and the reference's outputs.
        weight: a (n,), at least 1.
        constant: What `a/2 |f - t|^2` lacks of the two squares, `F / (2 a) |y - z|^2` (n,).
    """

    target: Tensor
    weight: Tensor
    constant: Tensor


def reference_targets(label_target: Tensor, scaled: Tensor, columns: Tensor) -> Tensor:
    """What every output is to match.

    Outputs for classes that the reference does not know match the label's target, as if the reference agreed with it:
    so a sample has one weight for all of its outputs.

    Args:
        label_target: Targets y of the labels (n, C).
        scaled: Outputs of the reference on their scale (n, S), for the classes that both models know.
        columns: Positions of these among the C (S,).

    Returns:
        z (n, C), in the precision of the label's targets.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> y, z = torch.tensor([[0.0, 0.0, 9.0]]), torch.tensor([[7.0, 2.0]])
        >>> reference_targets(y, z, torch.tensor([0, 2])).tolist()
        [[7.0, 0.0, 2.0]]
    """
    if scaled.shape != (len(label_target), len(columns)):
        raise ValueError(f"expected outputs ({len(label_target)}, {len(columns)}), got {tuple(scaled.shape)}")
    matched = label_target.clone()
    matched[:, columns.to(matched.device)] = scaled.to(matched)
    return matched


def match_targets(label_target: Tensor, reference: Tensor, focus: Tensor) -> MatchedTargets:
    """The per-sample weights and targets whose squared loss is that of labels and reference together.

    Args:
        label_target: Targets y of the labels (n, C).
        reference: What outputs are to match, z (n, C).
        focus: F (n,), see `focal_weights`.

    Returns:
        Targets and weights.

    Raises:
        ValueError: The shapes do not fit.

    Example:
        >>> import torch
        >>> both = match_targets(torch.tensor([[8.0, 0.0]]), torch.tensor([[4.0, 4.0]]), torch.tensor([3.0]))
        >>> both.target.tolist(), both.weight.tolist(), both.constant.tolist()
        ([[5.0, 3.0]], [4.0], [12.0])
    """
    if label_target.dim() != 2 or label_target.shape != reference.shape or focus.shape != label_target.shape[:1]:
        raise ValueError(
            f"expected targets and reference (n, C) and one number per sample (n,); got {tuple(label_target.shape)}, "
            f"{tuple(reference.shape)} and {tuple(focus.shape)}"
        )
    weight = 1 + focus
    share = (focus / weight).unsqueeze(1).to(label_target)
    apart = (label_target - reference).square().sum(1)
    return MatchedTargets(label_target + share * (reference - label_target), weight, 0.5 * share[:, 0] * apart)
