"""How much of a variable a simple decoder can read out of a representation, in bits."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.information.linear_decoder import fit_linear_decoder
from lqf_lightning.information.mlp_decoder import fit_mlp_decoder

Parts = tuple[Tensor, Tensor, Tensor]
_HIDDEN: dict[str, tuple[int, ...]] = {"linear": (), "mlp": (64,), "mlp2": (64, 64)}
DECODERS = tuple(_HIDDEN)
_CONSTANT = 1e-6  # a deviation that is nothing but rounding, over the mean
_DRAWS = 1_000_000  # looked at together, 8 MB


@dataclass(frozen=True)
class UsableInformation:
    """What a decoder found out about a variable; bits, estimated on samples that it has not seen.

    Attributes:
        bits: The usable information; below 0 where the decoder misleads.
        low: Lower end of its bootstrap interval.
        high: Upper end.
        control: The same estimate with shuffled labels, at most 0 but for chance.
        entropy: What there was to find out: cross-entropy of the variable's frequencies, `bits` is never above it.
        pointwise: By sample of the last part (n_C,), in order: its own information, whose mean is `bits`.
    """

    bits: float
    low: float
    high: float
    control: float
    entropy: float
    pointwise: Tensor

    @property
    def share(self) -> float:
        """`bits` over `entropy`; NaN for a variable with a single value."""
        return self.bits / self.entropy if self.entropy > 0 else math.nan


def usable_information(
    features: Tensor,
    label: Tensor,
    parts: Parts,
    *,
    decoder: str = "linear",
    classes: int | None = None,
    level: float = 0.95,
    resamples: int = 2000,
    seed: int = 0,
) -> UsableInformation:
    r"""Predictive information within a family of decoders (arXiv 2010.02459, 2002.10689, 2110.08420).

    .. math:: I_u(Z; V) = H(V) - \min_{g} E[-\log_2 g(V \mid Z)], \qquad
        \mathrm{PVI}_i = \log_2 g(v_i \mid z_i) - \log_2 g_0(v_i)

    Decoder g and null decoder :math:`g_0`, the frequencies, are fitted on part A, how much g is regularized or when it
    stops is decided on part B, and both cross-entropies are those of part C. It is a lower bound of the mutual
    information up to the choice of samples. In-sample estimates would find information in noise. The interval draws
    the samples of C anew, with the decoders as they are.

    Args:
        features: The representation z (n, D), any numbers; features are standardized by part A.
        label: Values v (n,), int64 from 0.
        parts: Positions of A, B and C, no sample in two of them; see `draw_parts`.
        decoder: "linear", "mlp" (64 hidden units) or "mlp2" (two layers of 64).
        classes: Number of values K; None takes the largest label.
        level: Coverage of the interval.
        resamples: Bootstrap draws.
        seed: Of the bootstrap, the shuffled labels and the weights that a network starts from; the random state of the
            process is left alone.

    Returns:
        The estimate. The same input gives the same numbers.

    Raises:
        ValueError: Shapes do not fit, a value is not finite or out of range, or an option is.

    Example:
        >>> import torch
        >>> bit = torch.tensor([0] * 10 + [1] * 10).repeat(3)
        >>> noisy = torch.where(torch.arange(60) % 10 == 0, 1 - bit, bit)  # one in ten is flipped
        >>> found = usable_information(noisy[:, None].double(), bit, tuple(torch.arange(60).split(20)))
        >>> round(found.bits, 4), found.entropy  # 1 - h2(0.1)
        (0.531, 1.0)
    """  # noqa: DOC502 - raised by _check
    _check(features, label, parts, decoder, classes, level, resamples)
    with torch.inference_mode(False), torch.enable_grad():
        label = label.detach().clone()
        rows = _standardize(features.detach().clone().double(), parts[0])
        number = int(label.max()) + 1 if classes is None else classes
        pointwise, null = _decode(rows, label, parts, number, decoder, seed)
        generator = torch.Generator().manual_seed(seed)
        shuffled = label[torch.randperm(len(label), generator=generator).to(label.device)]
        control, _ = _decode(rows, shuffled, parts, number, decoder, seed)
    low, high = _interval(pointwise, level, resamples, generator)
    return UsableInformation(float(pointwise.mean()), low, high, float(control.mean()), float(null.mean()), pointwise)


def draw_parts(number: int, shares: Sequence[float] = (0.5, 0.25, 0.25), seed: int = 0) -> Parts:
    """Split samples by lot into A to fit on, B to choose on and C to report on.

    Args:
        number: Number of samples.
        shares: Share of each part.
        seed: Another seed draws other parts.

    Returns:
        Positions of the parts, ascending, no sample twice.

    Raises:
        ValueError: The shares are not three positive numbers that add up to 1, or a part would be empty.

    Example:
        >>> [len(part) for part in draw_parts(100)]
        [50, 25, 25]
    """
    if len(shares) != 3 or min(shares) <= 0 or abs(sum(shares) - 1) > 1e-9:
        raise ValueError(f"expected three positive shares that add up to 1, got {list(shares)}")
    order = torch.randperm(number, generator=torch.Generator().manual_seed(seed))
    ends = [round(shares[0] * number), round((shares[0] + shares[1]) * number)]
    first, second, third = (part.sort().values for part in order.tensor_split(ends))
    if not min(len(first), len(second), len(third)):
        raise ValueError(f"{number} samples are too few for three parts with shares {list(shares)}")
    return first, second, third


def _decode(rows: Tensor, label: Tensor, parts: Parts, classes: int, decoder: str, seed: int) -> tuple[Tensor, Tensor]:
    # Pointwise information of part C, and how many bits its values are worth without a representation.
    first, second, third = parts
    prior = _prior(label[first], classes)
    null = -prior[label[third]] / math.log(2)
    if not rows.shape[1]:
        return torch.zeros_like(null), null
    fitted, chosen = (rows[first], label[first]), (rows[second], label[second])
    hidden = _HIDDEN[decoder]
    read: Callable[[Tensor], Tensor]
    if hidden:
        read = fit_mlp_decoder(fitted, chosen, prior, hidden=hidden, seed=seed)
    else:
        read = fit_linear_decoder(fitted, chosen, prior)
    told = read(rows[third]).gather(1, label[third].unsqueeze(1)).squeeze(1) / math.log(2)
    return told + null, null


def _prior(label: Tensor, classes: int) -> Tensor:
    # One sample's worth, spread evenly, so that a value that happens to be missing in A is not thought impossible.
    count = torch.bincount(label, minlength=classes).double()
    return ((count + 1 / classes) / (len(label) + 1)).log()


def _standardize(features: Tensor, first: Tensor) -> Tensor:
    # By part A; features that are constant there tell nothing and are left out.
    mean, deviation = features[first].mean(0), features[first].std(0, correction=0)
    varies = deviation > _CONSTANT * mean.abs()
    return (features[:, varies] - mean[varies]) / deviation[varies]


def _interval(values: Tensor, level: float, resamples: int, generator: torch.Generator) -> tuple[float, float]:
    values, number, means = values.cpu(), len(values), []
    for start in range(0, resamples, step := max(1, _DRAWS // number)):
        drawn = torch.randint(number, (min(step, resamples - start), number), generator=generator)
        means.append(values[drawn].mean(1))
    ends = torch.tensor([(1 - level) / 2, (1 + level) / 2], dtype=torch.float64)
    low, high = torch.cat(means).quantile(ends).tolist()
    return low, high


def _check(
    features: Tensor, label: Tensor, parts: Parts, decoder: str, classes: int | None, level: float, resamples: int
) -> None:
    if features.ndim != 2 or label.shape != features.shape[:1] or label.dtype != torch.int64:
        raise ValueError(
            f"expected features (n, D) and int64 labels (n,), got {tuple(features.shape)} and {tuple(label.shape)} of "
            f"{label.dtype}"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("the features hold values that are not finite: training has diverged, or images are broken")
    positions = torch.cat(parts)
    if len(parts) != 3 or not all(len(part) for part in parts) or int(positions.bincount().max()) > 1:
        raise ValueError(f"expected three parts of positions, no sample twice, got {[len(part) for part in parts]}")
    if int(label.min()) < 0 or (classes is not None and int(label.max()) >= classes):
        raise ValueError(f"labels lie between {int(label.min())} and {int(label.max())}, expected 0 to {classes} - 1")
    if decoder not in DECODERS or not 0 < level < 1 or resamples < 1:
        raise ValueError(
            f"got decoder={decoder!r}, level={level}, resamples={resamples}; expected a decoder among "
            f"{list(DECODERS)}, a level between 0 and 1 and at least one resample"
        )
