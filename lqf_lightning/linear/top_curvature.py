"""How long a step may be: the largest curvature that a preconditioned step meets."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.func import functional_call

from lqf_lightning.linear.full_precision import full_precision
from lqf_lightning.linear.linearized import LinearizedModel
from lqf_lightning.linear.reducer import Reducer

Direction = dict[str, Tensor]


@full_precision()
def top_curvature(
    model: LinearizedModel,
    batches: Sequence[Tensor],
    *,
    ridge: float,
    precondition: Callable[[Direction], Direction] = dict,
    iterations: int = 10,
    seed: int = 0,
    reducer: Reducer | None = None,
) -> float:
    r"""Estimate the largest eigenvalue of :math:`P (\frac{1}{n} \sum_i J_i^T J_i + \mu I)`, by power iteration.

    Gradient steps on the squared loss with preconditioner P are stable for rates below 2 over this value (without
    momentum; LQF, arXiv 2012.11140, section 3.2). Kronecker factors treat layers, positions and the two sides of a
    layer as uncorrelated, and small data sets have few directions, so the value lies far above 1, by an amount that
    no rule predicts: measure it on as many samples as a training step has. The iteration approaches it from below.

    Args:
        model: The linearized model; `dw` is left alone.
        batches: Inputs (B, ...) of this rank.
        ridge: mu, the strength of the penalty in the mean objective.
        precondition: Applies P to a direction; the default is the identity.
        iterations: Products with the curvature, each as dear as an epoch over the batches.
        seed: Of the starting direction, the same on every rank.
        reducer: Sums over ranks; None for a single process.

    Returns:
        The estimate, positive.

    Raises:
        ValueError: There is no sample, or the curvature vanishes.

    Example:
        >>> import torch
        >>> x = torch.tensor([[2.0, 0.0], [0.0, 1.0]])  # (1/2) x^T x = diag(2, 1/2)
        >>> model = LinearizedModel(torch.nn.Linear(2, 1, bias=False), example=x)
        >>> round(top_curvature(model, [x], ridge=0.5), 3)
        2.5
    """
    reducer = reducer or Reducer()
    generator = torch.Generator().manual_seed(seed)
    vector = {n: torch.randn(d.shape, generator=generator).to(d) for n, d in model.deltas.items()}
    value = 0.0
    for _ in range(iterations):
        length = _norm(vector)
        vector = {name: entry / length for name, entry in vector.items()}
        vector = precondition(_curve(model, batches, vector, ridge, reducer))
        value = float(_norm(vector))
        if value == 0:
            raise ValueError("the curvature is zero: the outputs do not depend on the linearized parameters")
    return value


def _curve(
    model: LinearizedModel, batches: Sequence[Tensor], vector: Direction, ridge: float, reducer: Reducer
) -> Direction:
    names = {name: f"dw.{name}" for name in vector}
    leaves = {names[name]: entry.detach().requires_grad_() for name, entry in vector.items()}
    zeros = {name: torch.zeros_like(entry) for name, entry in leaves.items()}
    total = [torch.zeros_like(entry) for entry in leaves.values()]
    with torch.enable_grad():
        for x in batches:
            with torch.no_grad():
                offset = functional_call(model, zeros, (x,))
            tangent = functional_call(model, leaves, (x,)) - offset
            torch._foreach_add_(total, torch.autograd.grad(0.5 * tangent.square().sum(), list(leaves.values())))
    count = reducer.sum_(torch.tensor(float(sum(len(x) for x in batches)), device=total[0].device))
    if count == 0:
        raise ValueError("no sample to measure the curvature on: the batches are empty on every rank")
    summed = (reducer.sum_(entry) / count for entry in total)
    return {name: product + ridge * vector[name] for name, product in zip(vector, summed, strict=True)}


def _norm(vector: Direction) -> Tensor:
    lengths: tuple[Tensor, ...] = torch._foreach_norm(list(vector.values()))
    return torch.stack(lengths).square().sum().sqrt()
