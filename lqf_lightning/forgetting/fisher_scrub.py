"""Weights hidden under noise where the retained samples can bear it: the Fisher scrub of nonlinear networks."""

import math
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor

Tensors = dict[str, Tensor]

_FLOOR = 1e-8  # added to the Fisher information, as in the papers' code
_CLEARED = 1e-4  # variance of the head's row of a class that is gone, as in the papers' code


def fisher_variance(
    fisher: Mapping[str, Tensor],
    *,
    strength: float = 1e-6,
    cap: float = 1e3,
    head: Collection[str] = (),
    head_cap: float = 1e2,
    factor: float = 10.0,
    by_filter: bool = True,
) -> Tensors:
    r"""Variance of the noise that a Fisher scrub adds to every weight.

    .. math:: v = s \min\!\left(\frac{1}{F + 10^{-8}},\ c\right)

    Eternal Sunshine (Golatkar et al., CVPR 2020) derives the covariance :math:`\sqrt{\lambda \sigma_h^2} F^{-1/2}` and
    reports that :math:`F^{-1}` works better, which is what its code uses and what this does. The caps, the average over
    the inputs of a filter, the factor of the head and of vectors (biases, gains of normalization) and the strength
    1e-6 are those of the code as well. That the head is told by its name, and not by the length of its tensors, is
    chosen here: a layer that happens to have as many filters as there are classes is treated like any other.

    Args:
        fisher: Diagonal of the Fisher information of the *retained* samples, a mean over them, by parameter name;
            see `congruence.diagonal_fisher`.
        strength: s, in squared units of the weights times those of F.
        cap: c, in units of 1 / F: no weight gets more than this, however little the samples mind.
        head: Names of the parameters of the last layer.
        head_cap: c of these.
        factor: What the variances of the head and of vectors are multiplied with.
        by_filter: Whether the weights of one filter that differ in nothing but their input share their mean variance.

    Returns:
        Variance by parameter name, shaped like the weights.

    Raises:
        ValueError: A strength, a cap or the factor is not positive, or the Fisher information is negative somewhere.

    Example:
        >>> import torch
        >>> fisher_variance({"weight": torch.tensor([[1.0, 0.0]])}, by_filter=False)["weight"].tolist()
        [[9.999999974752427e-07, 0.0010000000474974513]]
    """
    for option, value, usual in (
        ("strength", strength, "1e-6"), ("cap", cap, "1e3"), ("head_cap", head_cap, "1e2"), ("factor", factor, "10"),
    ):  # fmt: skip
        if not 0 < value < math.inf:
            raise ValueError(
                f"got {option}={value}, expected a positive number. Set ++callbacks.scrub.options.{option}={usual}"
            )
    variance = {}
    for name, information in fisher.items():
        if bool((information < 0).any()):
            raise ValueError(f"the Fisher information of {name!r} is negative, which no mean of squares is")
        own = strength * (information + _FLOOR).reciprocal().clamp(max=head_cap if name in head else cap)
        if by_filter and own.dim() > 1:
            own = own.mean(1, keepdim=True).expand_as(own).clone()
        variance[name] = own * factor if name in head or own.dim() == 1 else own
    return variance


def clear_rows(
    weights: Mapping[str, Tensor],
    variance: Mapping[str, Tensor],
    head: Collection[str],
    rows: Sequence[int],
    row_variance: float = _CLEARED,
) -> tuple[Tensors, Tensors]:
    """Wipe what the head knows of classes that are gone: mean zero, and one small variance for the whole row.

    Without it the row of a forgotten class stays where it was: no retained sample says what it should be. The variance
    is that of the paper's code before its factor for the head, which is left out here.

    Args:
        weights: By parameter name.
        variance: Of the noise, by the same names.
        head: Names of the head's parameters, with one row (or entry) per class; those that do not train are passed by.
        rows: Class positions; none leaves everything as it is.
        row_variance: Variance of their weights.

    Returns:
        New weights and new variances; what has not changed is shared with the old.

    Example:
        >>> import torch
        >>> weights, variance = {"fc.bias": torch.tensor([1.0, 2.0])}, {"fc.bias": torch.tensor([0.5, 0.5])}
        >>> weights, variance = clear_rows(weights, variance, ["fc.bias"], [1], 0.25)
        >>> weights["fc.bias"].tolist(), variance["fc.bias"].tolist()
        ([1.0, 0.0], [0.5, 0.25])
    """
    if not len(rows):
        return dict(weights), dict(variance)
    place = torch.as_tensor(rows, dtype=torch.int64)
    own = [name for name in head if name in weights]
    cleared = {name: weights[name].index_fill(0, place.to(weights[name].device), 0.0) for name in own}
    narrowed = {name: variance[name].index_fill(0, place.to(variance[name].device), row_variance) for name in own}
    return {**weights, **cleared}, {**variance, **narrowed}
