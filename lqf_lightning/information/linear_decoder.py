"""What a linear classifier reads out of a representation, trained to convergence."""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

RIDGES = tuple(10.0**power for power in range(1, -8, -1))
_PATIENCE = 2  # weaker ridges that do worse on the other samples before the search ends
_STEPS = 200


@dataclass(frozen=True)
class LinearDecoder:
    r"""Class probabilities :math:`\mathrm{softmax}(\log p_0 + W z + b)`, where p_0 knows nothing of z.

    Attributes:
        prior: :math:`\log p_0` (K,), nats.
        weight: W (D, K).
        bias: b (K,).
        ridge: The penalty that was chosen; infinite where W = 0 does best.
    """

    prior: Tensor
    weight: Tensor
    bias: Tensor
    ridge: float

    def __call__(self, rows: Tensor) -> Tensor:
        """Log probabilities of every class.

        Args:
            rows: Features (n, D).

        Returns:
            Nats (n, K).
        """
        return F.log_softmax(self.prior + rows @ self.weight + self.bias, dim=1)


def fit_linear_decoder(
    train: tuple[Tensor, Tensor], held_out: tuple[Tensor, Tensor], prior: Tensor, *, ridges: tuple[float, ...] = RIDGES
) -> LinearDecoder:
    r"""Multinomial logistic regression, its ridge chosen by the cross-entropy of other samples.

    .. math:: \min_{W, b} -\frac1n \sum_i \log p(y_i \mid z_i) + \frac\rho2 \lVert (W, b) \rVert^2

    The problem is convex; full-batch L-BFGS solves it from the strongest ridge to the weakest, each from where the last
    one ended, in the eigenvectors of the features and scaled by the curvature, where it converges in a few dozen steps.
    An infinite ridge, which leaves the prior alone, is always among the candidates, so that a decoder that cannot
    help does not harm. The search ends after two weaker ridges in a row that do worse than the best so far.

    Args:
        train: Features (n, D), of zero mean and unit variance, and class positions (n,), which are fitted.
        held_out: The same of other samples, which decide on the ridge.
        prior: Log probabilities without any feature (K,), nats.
        ridges: Candidates for rho, strongest first.

    Returns:
        The decoder, in double precision. The same input gives the same decoder.

    Example:
        >>> import torch
        >>> z, y = torch.tensor([[1.0], [-1.0]]).double().repeat(50, 1), torch.tensor([0, 1]).repeat(50)
        >>> decoder = fit_linear_decoder((z, y), (z, y), torch.full((2,), 0.5).log())
        >>> bool(decoder(z)[:, 0].exp()[0] > 0.999)
        True
    """
    rows, label = train[0].double(), train[1]
    prior = prior.double()
    weight = prior.new_zeros(rows.shape[1], len(prior))
    best = LinearDecoder(prior, weight, torch.zeros_like(prior), math.inf)
    least, worse = _cross_entropy(best, held_out), 0
    for decoder in _path(rows, label, prior, ridges):
        value = _cross_entropy(decoder, held_out)
        worse = 0 if value < least else worse + 1
        if value < least:
            best, least = decoder, value
        if worse == _PATIENCE:
            break
    return best


def _cross_entropy(decoder: LinearDecoder, samples: tuple[Tensor, Tensor]) -> float:
    return float(F.nll_loss(decoder(samples[0].double()), samples[1]))


def _path(rows: Tensor, label: Tensor, prior: Tensor, ridges: tuple[float, ...]) -> Iterator[LinearDecoder]:
    # In eigenvectors of the second moment, one of them the constant: theta (r + 1, K).
    values, vectors = _principal(rows)
    coordinates = F.pad(rows @ vectors, (0, 1), value=1.0)
    curvature = F.pad(values, (0, 1), value=1.0) / 4  # a fair coin's p (1 - p)
    theta = prior.new_zeros(len(curvature), len(prior))
    for ridge in ridges:
        scale = (curvature + ridge).sqrt()[:, None]
        theta = _minimize(coordinates / scale.T, label, prior, ridge / scale.square(), theta * scale) / scale
        yield LinearDecoder(prior, vectors @ theta[:-1], theta[-1], ridge)


def _principal(rows: Tensor) -> tuple[Tensor, Tensor]:
    # Second moments (r,) and directions (D, r) that the samples span.
    number, width = rows.shape
    few = number < width
    values, vectors = torch.linalg.eigh((rows @ rows.T if few else rows.T @ rows) / number)
    kept = values > 1e-12 * values.max().clamp_min(torch.finfo(values.dtype).tiny)
    values, vectors = values[kept], vectors[:, kept]
    return values, rows.T @ vectors / (number * values).sqrt() if few else vectors


def _minimize(rows: Tensor, label: Tensor, prior: Tensor, ridge: Tensor, start: Tensor) -> Tensor:
    # Written out, so that it also runs where gradients are switched off.
    theta, target = start.clone(), F.one_hot(label, len(prior)).to(rows)
    descent = torch.optim.LBFGS(
        [theta], max_iter=_STEPS, history_size=20, tolerance_grad=1e-9, tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )  # fmt: skip

    def evaluate() -> float:
        log_probability = F.log_softmax(prior + rows @ theta, dim=1)
        theta.grad = rows.T @ (log_probability.exp() - target) / len(rows) + ridge * theta
        penalty = 0.5 * float((ridge * theta.square()).sum())
        return penalty - float((log_probability * target).sum()) / len(rows)

    descent.step(evaluate)  # type: ignore[no-untyped-call]  # torch's own
    return theta
