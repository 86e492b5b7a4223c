"""A Kronecker-factored inverse of the Gauss-Newton matrix at `w0`.

For squared loss and a linearized model the Gauss-Newton matrix *is* the Hessian, and it depends on neither labels nor
`dw`: it is estimated once, before training (LQF, arXiv 2012.11140, section 3.2).
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from lqf_lightning.linear.fold_plan import FoldPlan
from lqf_lightning.linear.folded_network import FoldedNetwork
from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.gauss_newton_diagonal import sum_squared_jacobian
from lqf_lightning.linear.kronecker_factors import FactorRecorder, Form, KroneckerFactors
from lqf_lightning.linear.linearized import LinearizedModel
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.signs import sample_signs


class KFAC:
    """Approximates `(H + damping I)^-1` for `H = (1/N) sum_i J_i^T J_i`.

    A layer with factors `A (x) G` is inverted in their eigenbases, with damping added to the Kronecker *eigenvalues*:
    for a single dense layer the result is the exact inverse, which the usual split of the damping over the factors
    is not. Other parameters are divided by their diagonal of `H`.
    Eigenvectors come from double precision (single precision fails on rank-deficient factors), once: about `9 d^3`
    operations, so a 3x3 convolution with 512 channels (d = 4608) takes about 20 s on one CPU core. Ranks share the
    layers. Applying costs `2 P (d + o)` multiplications per step in the type of the factors, whatever the batch.

    Args:
        factors: Kronecker factors by layer name.
        diagonals: Diagonals by parameter name.
        damping: `mu`, the strength of the penalty `mu/2 |dw|^2` in the mean objective, or more.
        relative_floor: Further damping, in units of the mean eigenvalue of each block.
        reducer: Sums and broadcasts over ranks.
        watch: Wraps the layer names while their factors are decomposed, e.g. to show progress.

    Attributes:
        factors: As given.
        diagonals: As given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> net = nn.Linear(2, 1, bias=False)
        >>> x = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> kfac = fit_kfac(net, None, [x], damping=0.5, relative_floor=0.0)
        >>> gradient = torch.tensor([[1.0, 5.0]])  # H = diag(0.5, 2)
        >>> kfac.precondition({"weight": gradient})["weight"].round(decimals=4).tolist()
        [[1.0, 2.0]]
    """

    def __init__(
        self,
        factors: dict[str, KroneckerFactors],
        diagonals: dict[str, Tensor],
        *,
        damping: float,
        relative_floor: float = 1e-3,
        reducer: Reducer | None = None,
        watch: Callable[[list[str]], Iterable[str]] = iter,
    ) -> None:
        if damping < 0 or relative_floor < 0 or damping + relative_floor == 0:
            raise ValueError(
                f"got damping={damping} and relative_floor={relative_floor}, expected non-negative values of which at "
                "least one is positive"
            )
        self.factors, self.diagonals = factors, diagonals
        reducer = reducer or Reducer()
        self._blocks = {}
        for position, name in enumerate(watch(list(factors))):
            layer = factors[name]
            source = position % reducer.world_size
            eigen = [_eigenbasis(factor, source, reducer) for factor in (layer.inputs, layer.outputs)]
            (inputs, input_basis), (outputs, output_basis) = eigen
            values = outputs.unsqueeze(2) * inputs.unsqueeze(1)
            floor = damping + relative_floor * values.mean((1, 2), keepdim=True)
            self._blocks[name] = (layer, input_basis, output_basis, (values + floor).clamp_min(1e-30).reciprocal())
        self._scales = {
            name: (diagonal + damping + relative_floor * diagonal.mean()).clamp_min(1e-30).reciprocal()
            for name, diagonal in diagonals.items()
        }

    def precondition(self, gradients: dict[str, Tensor]) -> dict[str, Tensor]:
        """Apply the approximate inverse.

        Args:
            gradients: Gradient of the mean objective (penalty included) by parameter name.

        Returns:
            Newton-like direction by parameter name, in the types of the gradients.

        Raises:
            ValueError: If the names are not those that were fitted.
        """
        known = set(self._scales) | {n for layer, *_ in self._blocks.values() for n in (layer.weight, layer.bias) if n}
        if set(gradients) != known:
            odd = sorted(known.symmetric_difference(gradients))
            raise ValueError(f"got gradients of other parameters than were fitted; the first odd one is {odd[0]!r}")
        result = dict(gradients)
        for name, scale in self._scales.items():
            result[name] = (gradients[name].to(scale.dtype) * scale).to(gradients[name].dtype)
        for layer, input_basis, output_basis, inverse in self._blocks.values():
            parts = [gradients[name].reshape(*inverse.shape[:2], -1) for name in (layer.weight, layer.bias) if name]
            joined = torch.cat(parts, -1).to(inverse.dtype)
            rotated = output_basis.mT @ joined @ input_basis
            joined = output_basis @ (rotated * inverse) @ input_basis.mT
            pieces = torch.split(joined, [part.shape[-1] for part in parts], -1)
            for name, piece in zip([n for n in (layer.weight, layer.bias) if n], pieces, strict=True):
                result[name] = piece.reshape(gradients[name].shape).to(gradients[name].dtype)
        return result


def _eigenbasis(factor: Tensor, source: int, reducer: Reducer) -> tuple[Tensor, Tensor]:
    values, basis = torch.zeros_like(factor[..., 0]), torch.zeros_like(factor)
    if reducer.rank == source:
        wide = factor.cpu() if factor.device.type == "mps" else factor
        exact = torch.linalg.eigh(wide.double())
        values.copy_(exact.eigenvalues.clamp_min(0))
        basis.copy_(exact.eigenvectors)
    # Eigenvectors are not unique, so all ranks use those of one.
    return reducer.broadcast_(values, source), reducer.broadcast_(basis, source)


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

    Returns:
        The preconditioner, the same on every rank.

    Raises:
        ValueError: If there is no sample, or an option is unknown.
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
        return KFAC(
            _sum_factors(recorder, total, reducer),
            _sum_diagonals(recorder, diagonals, names, total, reducer),
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
