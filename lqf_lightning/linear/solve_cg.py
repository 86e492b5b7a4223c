"""The optimum by conjugate gradients: for any number of samples, with the whole Jacobian, never as a matrix."""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from lqf_lightning.linear.coefficient_descent import CoefficientDescent
from lqf_lightning.linear.conjugate_gradient import ConjugateGradient, Precondition
from lqf_lightning.linear.jacobian import StreamedJacobian
from lqf_lightning.linear.metric import Metric, Tensors
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.shard import Shard
from lqf_lightning.linear.solution import Solution


def solve_cg(
    problems: Sequence[QuadraticProblem],
    jacobian: StreamedJacobian,
    *,
    tolerance: float = 1e-3,
    max_steps: int = 100,
    exclude: Sequence[str] = (),
    metric: Metric | None = None,
    precondition: Callable[[float], Precondition] | None = None,
    approximate_inverse: Callable[[QuadraticProblem], Callable[[Tensor], Tensor]] | None = None,
    positions: Tensor | None = None,
    reducer: Reducer | None = None,
    watch: Callable[[Iterable[int]], Iterable[int]] = iter,
    note: Callable[[Sequence[ConjugateGradient]], None] | None = None,
) -> list[Solution]:
    """Solve several problems on the same Jacobian in the same passes over the data.

    They may differ in targets, weights, linear terms and ridge: several label sets, several lambdas, leave-one-out
    refits. A step costs two sweeps over the data, 6 units of work for the first problem (ordinary fine-tuning takes 3
    per epoch) and 5 for every further one; 2 more with an approximate inverse. Problems that have converged drop out.

    Args:
        problems: The problems, over the samples of all ranks.
        jacobian: The samples of this rank.
        tolerance: Stop at this relative gradient norm (see `Certificate`).
        max_steps: Stop after this many steps in any case; the certificate tells how far that got.
        exclude: Parameter names that do not move, above all the bias that the intercept stands for.
        metric: M; None for the identity.
        precondition: Called with a ridge, gives an approximate inverse of the Hessian; None takes `M^-1`.
        approximate_inverse: Called with a problem, gives an approximate inverse of its dual (`DualPrecondition`),
            to be used instead.
        positions: Position of each of this rank's samples among all (n_local,); None for a single process.
        reducer: Sums over ranks; None for a single process.
        watch: Wraps the range of steps, for a progress bar.
        note: Called after every step with the state of all problems.

    Returns:
        One solution per problem, `direction` included, the same on every rank.

    Raises:
        ValueError: There is no problem, the problems have different numbers of samples, or `exclude` is unknown.
    """
    counts = {problem.samples for problem in problems}
    if len(counts) != 1:
        raise ValueError(f"expected problems over the same samples, got numbers of samples {sorted(counts)}")
    samples = counts.pop()
    deltas = jacobian.model.deltas
    odd = [name for name in exclude if name not in deltas]
    if odd:
        raise ValueError(f"cannot exclude {odd[0]!r}, which is not among the linearized parameters")
    positions = torch.arange(samples) if positions is None else positions
    device = next(iter(deltas.values())).device  # where process groups expect what they sum
    passes = _Passes(jacobian, Shard(positions.to(device), samples, reducer))
    start = {name: torch.zeros_like(delta) for name, delta in deltas.items() if name not in exclude}
    descents = [_begin(problem, start, metric, precondition, approximate_inverse) for problem in problems]
    passes.gradients(descents)
    for _ in watch(range(max_steps)):
        active = [descent for descent in descents if descent.certificate.relative_gradient > tolerance]
        if not active:
            break
        passes.images(active)
        passes.gradients(active)
        if note is not None:
            note(descents)
    return [descent.solution() for descent in descents]


def _begin(
    problem: QuadraticProblem,
    start: Tensors,
    metric: Metric | None,
    precondition: Callable[[float], Precondition] | None,
    approximate_inverse: Callable[[QuadraticProblem], Callable[[Tensor], Tensor]] | None,
) -> ConjugateGradient:
    if approximate_inverse is not None:
        return CoefficientDescent(problem, start, approximate_inverse(problem), metric=metric)
    return ConjugateGradient(
        problem, start, metric=metric, precondition=precondition(problem.ridge) if precondition else None
    )


class _Passes:
    """Runs sweeps for several descents at once, over all ranks."""

    def __init__(self, jacobian: StreamedJacobian, shard: Shard) -> None:
        self.jacobian, self.shard = jacobian, shard

    def images(self, descents: Sequence[ConjugateGradient]) -> None:
        directions = [descent.direction for descent in descents]
        device = self.shard.positions.device
        if len(self.shard.positions):
            rows = self.jacobian.push(*directions)
        else:
            rows = [descent.image.new_zeros(0, descent.problem.outputs, device=device) for descent in descents]
        for descent, own in zip(descents, rows, strict=True):
            descent.receive_image(self.shard.spread(own))

    def gradients(self, descents: Sequence[ConjugateGradient]) -> None:
        counts, sides = [], []
        for descent in descents:
            own = [self.shard.own(side) for side in descent.sides]
            counts.append(len(own))
            sides += own
        pulled = iter(self._pull(sides))
        for descent, count in zip(descents, counts, strict=True):
            descent.receive_sides(*(self._summed(next(pulled)) for _ in range(count)))

    def _summed(self, pulled: Tensors) -> Tensors:
        return {name: self.shard.reducer.sum_(entry) for name, entry in pulled.items()}

    def _pull(self, sides: Sequence[Tensor]) -> list[Tensors]:
        if not len(self.shard.positions):
            deltas = self.jacobian.model.deltas
            return [{name: torch.zeros_like(delta) for name, delta in deltas.items()} for _ in sides]
        return self.jacobian.pull(*sides)
