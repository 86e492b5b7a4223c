"""The noise that a scrubbed model is released with, sized alike whatever its shape."""

import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from lqf_lightning.forgetting.kronecker_noise import KroneckerNoise
from lqf_lightning.forgetting.noise import DiagonalNoise, IsotropicNoise, Noise
from lqf_lightning.linear import current_reducer, fit_kfac
from lqf_lightning.linear.gauss_newton_diagonal import sum_squared_jacobian
from lqf_lightning.linear.metric import dot
from lqf_lightning.linear.signs import sample_signs
from lqf_lightning.methods import LQF, Method
from lqf_lightning.methods.solvers.curvature_samples import curvature_samples
from lqf_lightning.methods.solvers.training_table import training_batches

log = logging.getLogger(__name__)
NoiseKind = Literal["auto", "isotropic", "diagonal", "kfac", "none"]
_CHUNK = 8


def release_noise(method: Method, kind: NoiseKind, sigma: float) -> Noise | None:
    r"""Choose the noise; the shaped ones are weak where the loss is curved, :math:`\Sigma \propto B^{-1/2}`.

    B is the curvature of the mean objective on the present training samples, penalty included: its diagonal, or its
    Kronecker factors. All ranks have to call this together.

    Args:
        method: The method, attached to a trainer; only `lqf` has a curvature that does not move with its weights.
        kind: "isotropic", "diagonal", "kfac" or "none" (see `noise_kind` for "auto").
        sigma: Root mean square deviation over all weights.

    Returns:
        The noise, the same on every rank; None for "none".

    Raises:
        ValueError: There is no such noise for this method.
    """
    if kind == "none":
        return None
    if kind not in ("isotropic", "diagonal", "kfac"):
        raise ValueError(
            f"got noise={kind!r}, expected isotropic, diagonal, kfac or none. Set callbacks.scrub.noise=isotropic"
        )
    if not 0 < sigma < math.inf:
        raise ValueError(
            f"got sigma={sigma}, expected a positive number. Set callbacks.scrub.sigma=0.001, or noise=none"
        )
    if kind == "isotropic":
        return IsotropicNoise(sigma)
    if not isinstance(method, LQF):
        raise ValueError(
            f"noise={kind} is shaped by the curvature of a linear model, got {type(method).__name__}. Set "
            "callbacks.scrub.noise=isotropic"
        )
    return _diagonal(method, sigma) if kind == "diagonal" else _kronecker(method, sigma)


def noise_kind(method: Method, kind: NoiseKind) -> NoiseKind:
    """Choose where the choice is "auto": noise makes a bound for a linear model, and is of no use to others.

    Args:
        method: The method.
        kind: What was asked for.

    Returns:
        The kind.
    """
    if kind != "auto":
        return kind
    return "isotropic" if isinstance(method, LQF) else "none"


def _diagonal(method: LQF, sigma: float) -> DiagonalNoise:
    deltas = method.linearized.deltas
    sums: dict[str, Tensor] = {name: torch.zeros_like(entry, dtype=torch.float64) for name, entry in deltas.items()}
    count = torch.zeros((), dtype=torch.int64, device=method.device)
    with torch.inference_mode(False), torch.no_grad():
        for batch in training_batches(method, "curvature for the noise"):
            if not len(batch.target):
                continue
            # One random combination of outputs per sample, drawn from its content: unbiased, and ranks play no part.
            signs = sample_signs(batch.input, len(method.classes), seed=0).to(batch.input)
            squares = sum_squared_jacobian(
                method.linearized.model, list(deltas), batch.input, signs.unsqueeze(0), _CHUNK
            )
            for name, entry in squares.items():
                sums[name] += entry
            count += len(batch.target)
    reducer = current_reducer()
    for tensor in (count, *sums.values()):
        reducer.sum_(tensor)
    weights = method.penalty_weights()
    curvature = {name: entry / count + method.ridge * weights.get(name, 1.0) for name, entry in sums.items()}
    inverse_root = sum(float(entry.rsqrt().sum()) for entry in curvature.values()) / _size(curvature)
    return DiagonalNoise.optimal(curvature, scale=sigma**2 / inverse_root)


def _kronecker(method: LQF, sigma: float) -> KroneckerNoise:
    kfac = fit_kfac(
        method.linearized,
        None,
        curvature_samples(method, method.preconditioner_samples),
        damping=method.ridge,
        cotangents="random",
        reducer=current_reducer(),
    )
    unit = KroneckerNoise.optimal(kfac, ridge=method.ridge, scale=1.0)
    like: dict[str, Any] = {name: entry.detach() for name, entry in method.linearized.deltas.items()}
    drawn = unit.draw(like, seed=0)  # millions of numbers: their mean square is that of the distribution
    mean_square = dot(drawn, drawn) / _size(like)
    log.info("the noise follows Kronecker factors, with a root mean square deviation of %.3g", sigma)
    return KroneckerNoise.optimal(kfac, ridge=method.ridge, scale=sigma**2 / mean_square)


def _size(tensors: dict[str, Tensor]) -> int:
    return sum(entry.numel() for entry in tensors.values())
