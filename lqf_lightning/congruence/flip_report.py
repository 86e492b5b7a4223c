"""What an upgrade did to right and wrong predictions, from counts.

All rates come from the four counts `n[o][w]` of samples by old model right (`o` = 1) or wrong (0) and new model right
(`w` = 1) or wrong (0): negative flips are `n[1][0]`, positive flips `n[0][1]`.
"""

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class FlipReport:
    """Rates of an upgrade, as fractions; NaN where there is nothing to divide by.

    Attributes:
        number: Number of samples N.
        error_old: Error rate of the old model.
        error_new: Error rate of the new model.
        nfr: Negative flip rate, the share of samples that the old model gets right and the new one wrong.
        pfr: Positive flip rate, the share that the old model gets wrong and the new one right.
        relative_nfr: Negative flips as a multiple of those of two models that err independently of each other.
        nfi: Share of negative flips among the new model's errors.
        pfi: Share of positive flips among the samples that the new model gets right.
    """

    number: int
    error_old: float
    error_new: float
    nfr: float
    pfr: float
    relative_nfr: float
    nfi: float
    pfi: float


def flip_rates(table: Tensor) -> dict[str, Tensor]:
    r"""Rates of one or many tables of counts (Yan et al., CVPR 2021, eqs. 2 and 11).

    .. math::
        \mathrm{NFR} = \frac{n_{10}}{N}, \quad \mathrm{PFR} = \frac{n_{01}}{N}, \quad
        \mathrm{NFI} = \frac{n_{10}}{n_{00} + n_{10}}, \quad
        \mathrm{NFR_{rel}} = \frac{\mathrm{NFR}}{(1 - \mathrm{ER_o})\, \mathrm{ER_n}}
                           = \frac{\mathrm{NFI}}{1 - \mathrm{ER_o}}

    On any samples NFR - PFR = ER_n - ER_o.

    Args:
        table: Non-negative whole numbers (..., 2, 2): [old model right?, new model right?].

    Returns:
        Every rate of `FlipReport` by name (...), double precision. NaN: all rates without samples; `nfi` and
        `relative_nfr` without errors of the new model, `relative_nfr` also if the old model is never right; `pfi` if
        the new model is never right.

    Raises:
        ValueError: The shape is another.

    Example:
        >>> import torch
        >>> rates = flip_rates(torch.tensor([[2, 1], [3, 4]]))
        >>> [round(float(rates[name]), 4) for name in ("error_old", "error_new", "nfr", "pfr", "nfi", "relative_nfr")]
        [0.3, 0.5, 0.3, 0.1, 0.6, 0.8571]
    """
    if table.shape[-2:] != (2, 2):
        raise ValueError(f"got counts of shape {tuple(table.shape)}, expected (..., 2, 2): [old right?, new right?]")
    both_wrong, positive, negative, both_right = table.double().flatten(-2).unbind(-1)
    number, wrong, right = table.double().sum((-2, -1)), both_wrong + negative, positive + both_right
    nfi = negative / wrong
    return {
        "error_old": (both_wrong + positive) / number,
        "error_new": wrong / number,
        "nfr": negative / number,
        "pfr": positive / number,
        "relative_nfr": nfi / ((negative + both_right) / number),
        "nfi": nfi,
        "pfi": positive / right,
    }


def flip_report(table: Tensor) -> FlipReport:
    """Rates of one table of counts.

    Args:
        table: Non-negative whole numbers (2, 2): [old model right?, new model right?].

    Returns:
        The rates.

    Raises:
        ValueError: The shape is another.

    Example:
        >>> import torch
        >>> flip_report(torch.tensor([[1, 1], [0, 2]]))  # doctest: +NORMALIZE_WHITESPACE
        FlipReport(number=4, error_old=0.5, error_new=0.25, nfr=0.0, pfr=0.25, relative_nfr=0.0, nfi=0.0,
                   pfi=0.3333333333333333)
    """
    if table.shape != (2, 2):
        raise ValueError(f"got counts of shape {tuple(table.shape)}, expected (2, 2): [old right?, new right?]")
    return FlipReport(number=int(table.sum()), **{name: float(rate) for name, rate in flip_rates(table.cpu()).items()})
