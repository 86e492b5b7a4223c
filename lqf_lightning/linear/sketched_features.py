"""Sketched Jacobians of a network, with a measured error that says what they are fit for."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.features import Features
from lqf_lightning.linear.folded_jacobian import exactly
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.linearized import LinearizedModel
from lqf_lightning.linear.primal import PrimalFactor
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.sample_rows import sample_rows
from lqf_lightning.linear.sketch import Sketch, copies_of

_NUMBERS = 2**28  # numbers of Jacobian rows at once: 1 GiB
_ROWS = 512  # rows that the error is measured on


@dataclass(frozen=True)
class SketchedFeatures:
    r"""Sketched rows of this rank's samples and the size of their error.

    The error of a sketched kernel :math:`\hat K` is expressed by the number of dense Gaussian columns that would have
    it, :math:`D_{eff} = (\lVert K \rVert_F^2 + (\mathrm{tr} K)^2) / E \lVert \hat K - K \rVert_F^2`, measured by how
    far independent copies of the sketch lie apart. What is solved with it then errs by `expected_error`.

    Attributes:
        features: The rows (n, C, D).
        effective_dimension: The number above; infinite for exact rows.
    """

    features: Features
    effective_dimension: float

    def kernel(self, exact: Kernel | None = None, other: Tensor | None = None) -> Kernel:
        """The sketched kernel, for a single process.

        Args:
            exact: Kernels of layer groups that were left out of the sketch, above all the last layer, which are known
                exactly: a control variate. The error of the rest then counts for less, see `combined_dimension`.
            other: Sketched rows (m, C, D) of other samples, by the same sketch; None for those among themselves.

        Returns:
            The group "sketch" and those of `exact`.

        Raises:
            ValueError: `exact` is not a full kernel of as many outputs, or has a group "sketch" itself.
        """
        outputs = self.features.rows.shape[1]
        if exact is not None and (exact.form != "full" or exact.outputs != outputs or "sketch" in exact.groups):
            raise ValueError(
                f"expected a full kernel of {outputs} outputs without a group 'sketch', got a {exact.form} one of "
                f"{exact.outputs} with {list(exact.groups)}"
            )
        rows = self.features.rows.double().flatten(0, 1)
        left = rows if other is None else other.double().flatten(0, 1)
        groups = {} if exact is None else dict(exact.groups)
        return Kernel({"sketch": (left @ rows.T)[None], **groups}, outputs)

    def combined_dimension(self, exact: Kernel) -> float:
        """The effective dimension of the sketch together with exactly known groups.

        Args:
            exact: As for `kernel`.

        Returns:
            The effective dimension of the sum.
        """
        own, whole = self.kernel().total(), self.kernel(exact).total()
        return self.effective_dimension * float(_scale(whole) / _scale(own))


def sketch_features(
    model: LinearizedModel,
    batches: Iterable[Tensor],
    sketch: Sketch,
    *,
    copies: int = 2,
    names: Iterable[str] | None = None,
    index: Tensor | None = None,
    batched: bool | None = None,
    reducer: Reducer | None = None,
    watch: Callable[[Iterable[Tensor]], Iterable[Tensor]] = iter,
) -> SketchedFeatures:
    """Sketch the Jacobians of this rank's samples.

    Rows are formed a few samples at a time, at C backward passes per sample, and dropped.

    Args:
        model: The linearized model.
        batches: Inputs (B, ...) of this rank.
        sketch: Kind, size and seed. Validation samples need the same.
        copies: Independent sketches to average, each of the size given; from 2 on their error can be measured.
        names: Linearized parameters to sketch; None for all of them.
        index: Index of every sample in the data set (n,).
        batched: Whether to vectorize the network over samples, which not every operator can; None does so except on a
            CPU, where it takes twice as long.
        reducer: Sums the error over ranks; None for a single process.
        watch: Wraps the batches, for a progress bar.

    Returns:
        The rows, `copies` times as wide as a single sketch.

    Raises:
        ValueError: Fewer than 2 copies, an unknown name, or no sample.
    """
    chosen = list(model.deltas if names is None else names)
    odd = [name for name in chosen if name not in model.deltas]
    if copies < 2 or odd:
        raise ValueError(f"expected linearized parameters and at least 2 copies, got {odd[:3]} and {copies}")
    shapes = {name: tuple(delta.shape) for name, delta in model.deltas.items() if name in set(chosen)}
    parts = [
        torch.stack([_apply(one, rows, shapes) for one in copies_of(sketch, copies)])
        for rows in _stream(model, watch(batches), shapes, batched)
    ]
    if not parts:
        raise ValueError("this rank has no sample to take a Jacobian of: use fewer ranks than samples")
    rows = torch.cat(parts, 1)
    dimension = effective_dimension(rows.flatten(1, 2), reducer)
    return SketchedFeatures(Features(rows.movedim(0, 2).flatten(2) * copies**-0.5, index), dimension)


def effective_dimension(copies: Tensor, reducer: Reducer | None = None) -> float:
    """Measure the error of an average of sketches, from how far they lie apart.

    Args:
        copies: Rows by independent sketches (k, m, D), each with the right inner products on average.
        reducer: Sums over ranks.

    Returns:
        Number of dense Gaussian columns with the same error; infinite if the copies agree.
    """
    few = copies[:, :: max(1, copies.shape[1] // _ROWS)].double()
    kernels = few @ few.mT
    mean, number = kernels.mean(0), len(kernels)
    error = (kernels - mean).square().sum() / (number * (number - 1))
    totals = torch.stack([error, (_scale(mean) - error).clamp_min(0.0)])
    error, scale = (reducer or Reducer()).sum_(totals).tolist()
    # Copies that keep rows as they are differ by rounding at most.
    return scale / error if error > 1e-24 * scale else math.inf


def expected_error(dimension: float, degrees_of_freedom: float) -> float:
    r"""Relative error to expect of leave-one-out residuals on a sketched kernel, :math:`\sqrt{d / D_{eff}}`.

    A sketch distorts the subspace that the ridge leaves alive, of :math:`d = \mathrm{tr} K (K + \lambda)^{-1}`
    dimensions, by about this much. Measured for 80 textures on EfficientNet-Lite0 and ridges of 1e-1 to 1e-3 mean
    kernel diagonals: 0.19 - 0.25 for 0.2 - 0.22 expected, with rank correlations of 0.93; 0.05 - 0.065 for 0.05, with
    0.99 and more. Near 1 samples cannot even be ranked (0.4 - 0.6). For kinds other than dense and sparse it is rather
    too large.

    Args:
        dimension: Effective dimension of the sketch.
        degrees_of_freedom: Of the fit, summed over outputs.

    Returns:
        The ratio of norms.

    Example:
        >>> expected_error(40000, 400)
        0.1
    """
    return math.sqrt(degrees_of_freedom / dimension)


def solve_sketched(
    problem: QuadraticProblem,
    sketched: SketchedFeatures,
    *,
    tolerance: float = 0.05,
    allow_approximate: bool = False,
    reducer: Reducer | None = None,
) -> PrimalFactor:
    """Solve a problem on sketched features, if the sketch is fit for it.

    The optimum and the leave-one-out results of the factor are exact for the sketched model; this says how near that
    is to the network's own linearization.

    Args:
        problem: This rank's samples.
        sketched: Their features.
        tolerance: Largest expected relative error of leave-one-out residuals.
        allow_approximate: Whether to go on regardless, as for ranking samples.
        reducer: Sums and gathers over ranks; None for a single process.

    Returns:
        The solved problem.

    Raises:
        ValueError: The expected error exceeds the tolerance.
    """
    factor = PrimalFactor(problem, sketched.features, reducer)
    error = expected_error(sketched.effective_dimension, factor.degrees_of_freedom)
    if error > tolerance and not allow_approximate:
        width, needed = sketched.features.rows.shape[2], (error / tolerance) ** 2
        raise ValueError(
            f"a sketch with {width} columns, worth {sketched.effective_dimension:.0f} dense ones, is unfit for solving "
            f"with {factor.degrees_of_freedom:.0f} degrees of freedom: leave-one-out residuals would be off by about "
            f"{error:.0%}, tolerated are {tolerance:.0%}. It would take {needed:.0f} times the columns, or a larger "
            "ridge; up to 20,000 samples times outputs use the exact kernel, beyond that conjugate gradients. To rank "
            "samples nevertheless, pass allow_approximate=True"
        )
    return factor


def _stream(
    model: LinearizedModel, batches: Iterable[Tensor], shapes: dict[str, tuple[int, ...]], batched: bool | None
) -> Iterable[dict[str, Tensor]]:
    state = {**dict(model.model.named_parameters()), **dict(model.model.named_buffers())}
    like = next(iter(model.deltas.values()))
    batched = like.device.type != "cpu" if batched is None else batched
    directions: Tensor | None = None
    for batch in batches:
        x = batch.to(like.device)
        with exactly(x.device, False):
            if directions is None:
                directions = torch.eye(model.folded(x).value(x[:1]).shape[1]).to(like)
            numbers = len(directions) * sum(map(math.prod, shapes.values()))
            for part in torch.split(x, max(1, _NUMBERS // numbers)):
                yield sample_rows(model.model, state, list(shapes), part, directions, batched=batched)


def _apply(sketch: Sketch, rows: dict[str, Tensor], shapes: dict[str, tuple[int, ...]]) -> Tensor:
    first = next(iter(rows.values()))
    flat = {name: entry.flatten(0, 1) for name, entry in rows.items()}
    return sketch.apply(flat, shapes).reshape(*first.shape[:2], -1)


def _scale(kernel: Tensor) -> Tensor:
    result: Tensor = kernel.square().sum() + kernel.diagonal(dim1=-2, dim2=-1).sum().square()
    return result
