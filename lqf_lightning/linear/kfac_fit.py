"""Kronecker factors of a network's curvature, from one pass over samples."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lqf_lightning.linear.fold_plan import FoldPlan
from lqf_lightning.linear.folded_network import FoldedNetwork
from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.gauss_newton_diagonal import sum_squared_jacobian
from lqf_lightning.linear.kfac import KFAC
from lqf_lightning.linear.kronecker_factors import FactorRecorder, Form, KroneckerFactors
from lqf_lightning.linear.linearized import LinearizedModel
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.signs import sample_signs


@full_precision()
def fit_kfac(
    model: nn.Module,
    parameters: Iterable[str] | None,
    batches: Iterable[Tensor],
    *,
    damping: float,
    cotangents: Literal["exact", "random"] = "exact",
    form: Form = "expand",
    relative_floor: float = 1e-3,
    seed: int = 0,
    chunk: int = 8,
    reducer: Reducer | None = None,
    watch: Callable[[list[str]], Iterable[str]] = iter,
    intercept: str | None = None,
) -> KFAC:
    """Estimate the curvature of a network at its weights and prepare its inverse.

    Args:
        model: LinearizedModel, or a network at `w0`; it is not changed.
        parameters: Trained parameters; None takes those of the LinearizedModel, or all.
        batches: Inputs (B, ...) of this rank; wrap the iterable to show progress. Uneven shards are fine.
        damping: See KFAC.
        cotangents: "exact" runs C backward passes per batch, "random" one with random signs, whose factors are
            unbiased; they belong to the samples, so that ranks do not matter.
        form: "expand" or "reduce", see `kronecker_factors`; the second costs about a third.
        relative_floor: See KFAC.
        seed: Of the random cotangents, which leave the global generators alone.
        chunk: Samples in flight for the diagonals.
        reducer: Sums over ranks; None for a single process.
        watch: See KFAC.
        intercept: Name of a trained bias that is at its optimum whatever the other parameters are: it gets no factor,
            and the inputs of its layer count from their mean. Everything else is unchanged.

    Returns:
        The preconditioner, the same on every rank.

    Raises:
        ValueError: If there is no sample, an option is unknown, or the intercept is no bias of a fitted layer.
    """
    if cotangents not in ("exact", "random") or form not in ("expand", "reduce"):
        raise ValueError(
            f"got cotangents={cotangents!r}, form={form!r}; expected 'exact' or 'random', and 'expand' or 'reduce'"
        )
    reducer = reducer or Reducer()
    if isinstance(model, LinearizedModel):
        parameters = model.names if parameters is None else parameters
        model = model.model
    names = [name for name, _ in model.named_parameters()] if parameters is None else list(parameters)
    network = FoldedNetwork(model, FoldPlan()).structure.eval()
    with torch.inference_mode(False), torch.enable_grad():
        with FactorRecorder(network, names, form) as recorder:
            diagonals, count = _accumulate(recorder, names, batches, cotangents, seed, chunk)
        total = float(reducer.sum_(torch.tensor(float(count), device=next(model.parameters()).device)))
        if total == 0:
            raise ValueError("no sample to estimate the curvature from: the batches are empty on every rank")
        factors = _sum_factors(recorder, total, reducer)
        summed = _sum_diagonals(recorder, diagonals, names, total, reducer)
        if intercept is not None:
            _eliminate(factors, intercept)
        return KFAC(
            factors,
            summed,
            damping=damping,
            relative_floor=relative_floor,
            reducer=reducer,
            watch=watch,
        )


def _accumulate(
    recorder: FactorRecorder,
    names: Sequence[str],
    batches: Iterable[Tensor],
    cotangents: str,
    seed: int,
    chunk: int,
) -> tuple[dict[str, Tensor], int]:
    diagonals: dict[str, Tensor] = {}
    count = 0
    device = next(recorder.network.parameters()).device
    for batch in batches:
        x = batch.detach().to(device).clone()
        output = recorder.forward(x)
        directions = _draw(x, output, cotangents, seed)
        for left, direction in zip(reversed(range(len(directions))), directions, strict=True):
            if recorder.starts:
                torch.autograd.grad(output, recorder.starts, direction, retain_graph=left > 0)
        rest = _without_factors(recorder, recorder.calls, names)
        squares = sum_squared_jacobian(recorder.network, rest, x, directions, chunk) if rest else {}
        for name, square in squares.items():
            diagonals[name] = diagonals[name] + square if name in diagonals else square
        count += len(x)
    return diagonals, count


def _draw(x: Tensor, output: Tensor, cotangents: str, seed: int) -> Tensor:
    # (V, B, C): every unit vector for every sample, or one vector of signs, with E[v v^T] = I.
    if cotangents == "exact":
        return torch.eye(output.shape[1]).to(output).unsqueeze(1).expand(-1, len(output), -1)
    return sample_signs(x, output.shape[1], seed).to(output).unsqueeze(0)


def _without_factors(recorder: FactorRecorder, calls: Mapping[str, int], names: Sequence[str]) -> list[str]:
    covered = {n for name, layer in recorder.factors.items() if calls.get(name) for n in (layer.weight, layer.bias)}
    return [name for name in names if name not in covered]


def _sum_factors(recorder: FactorRecorder, total: float, reducer: Reducer) -> dict[str, KroneckerFactors]:
    calls = torch.tensor([float(recorder.calls[name]) for name in recorder.factors])
    device = next(recorder.network.parameters()).device
    for name, count in zip(recorder.factors, reducer.sum_(calls.to(device)).tolist(), strict=True):
        recorder.calls[name] = int(count)  # also what other ranks have run, should this one have no sample
    summed = {name: layer for name, layer in recorder.factors.items() if recorder.calls[name]}
    for layer in summed.values():
        layer.inputs = reducer.sum_(layer.inputs) / total
        layer.outputs = reducer.sum_(layer.outputs) / total
    return summed


def _sum_diagonals(
    recorder: FactorRecorder, local: dict[str, Tensor], names: Sequence[str], total: float, reducer: Reducer
) -> dict[str, Tensor]:
    summed = {}
    for name in _without_factors(recorder, recorder.calls, names):
        own = local.get(name)
        own = torch.zeros_like(recorder.network.get_parameter(name)) if own is None else own
        summed[name] = reducer.sum_(own.contiguous()) / total
    return summed


def _eliminate(factors: dict[str, KroneckerFactors], intercept: str) -> None:
    layer = next((layer for layer in factors.values() if layer.bias == intercept), None)
    if layer is None:
        biases = [layer.bias for layer in factors.values() if layer.bias]
        raise ValueError(f"the intercept {intercept!r} is no bias of a fitted layer; these are {biases}")
    if layer.weight is None:
        factors.pop(next(name for name, entry in factors.items() if entry is layer))
        return
    # The Schur complement of the bias, whose own entry is the mean of ones (per position).
    column, corner = layer.inputs[:, :-1, -1:], layer.inputs[:, -1:, -1:]
    layer.inputs = layer.inputs[:, :-1, :-1] - column @ column.mT / corner
    layer.bias = None
