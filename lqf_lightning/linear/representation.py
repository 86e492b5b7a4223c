"""In what form to solve a linear-quadratic problem: a choice that depends on its sizes only."""

from dataclasses import dataclass
from typing import Literal

_GIB = 2**30
_COPIES = 3  # of a factored matrix in double precision: itself, its factor, its inverse


@dataclass(frozen=True)
class Representation:
    """A choice and why it was made.

    Attributes:
        name: "kernel" for one factorization of the exact kernel, "features" for one in feature space, "streamed" for
            conjugate gradients that pass over the data.
        reason: One sentence with the numbers, for the log.
        memory: Bytes that the choice takes beside the network.
    """

    name: Literal["kernel", "features", "streamed"]
    reason: str
    memory: int


def choose_representation(
    samples: int,
    outputs: int,
    parameters: int,
    budget: int = 12 * _GIB,
    *,
    features: int | None = None,
    shared: bool = True,
    groups: int = 1,
    limit: int = 20_000,
) -> Representation:
    """Choose the cheapest exact form that fits.

    Features, where they represent the Jacobian exactly, take n D^2 + D^3 / 3 operations, the kernel N^3 / 3 with
    N = n C; conjugate gradients take one linearized epoch per iteration. A sketch is never chosen: it is not exact.

    Args:
        samples: Number of training samples n.
        outputs: Number of outputs C.
        parameters: Number of linearized parameters P.
        budget: Bytes that may be used.
        features: D, if features that stand for the Jacobian exactly are at hand: those of the last layer, or all
            parameters of a small network.
        shared: Whether the outputs share the features.
        groups: Layer groups whose kernels are kept apart, in single precision.
        limit: Largest N that is factored as a kernel.

    Returns:
        The choice.

    Raises:
        ValueError: A size is not positive.

    Example:
        >>> choose_representation(500, 10, 11_000_000).name
        'kernel'
        >>> print(choose_representation(50_000, 10, 11_000_000).reason)
        conjugate gradients: a kernel of 50,000 samples x 10 outputs = 500,000 rows is over the limit of 20,000
    """
    sizes = {"samples": samples, "outputs": outputs, "parameters": parameters, "features": features, "budget": budget}
    odd = [f"{name}={size}" for name, size in sizes.items() if size is not None and size < 1]
    if odd:
        raise ValueError(f"sizes must be positive, got {', '.join(odd)}")
    rows = samples * outputs
    kernel = (8 * _COPIES + 4 * groups) * rows**2
    fits_kernel = rows <= limit and kernel <= budget
    if features is not None:
        chosen = _features(samples, outputs, features, shared, budget, rows if fits_kernel else None)
        if chosen is not None:
            return chosen
    many = f"{samples:,} samples x {outputs:,} outputs = {rows:,} rows"
    if fits_kernel:
        reason = f"exact kernel: {many} (limit {limit:,}) take {_gib(kernel)} of {_gib(budget)}"
        return Representation("kernel", reason, kernel)
    obstacle = (
        f"is over the limit of {limit:,}" if rows > limit else f"takes {_gib(kernel)}, the budget is {_gib(budget)}"
    )
    # Iterate, residual, direction, product and preconditioned residual, in single precision.
    return Representation("streamed", f"conjugate gradients: a kernel of {many} {obstacle}", 5 * 4 * parameters)


def _features(
    samples: int, outputs: int, features: int, shared: bool, budget: int, rows: int | None
) -> Representation | None:
    per_sample = 1 if shared else outputs
    memory = 8 * _COPIES * features**2 + 4 * samples * per_sample * features
    work = samples * per_sample * features**2 + features**3 / 3
    if memory > budget or (rows is not None and work > rows**3 / 3):
        return None
    kind = "shared" if shared else "coupled"
    reason = f"feature space: {features:,} {kind} features of {samples:,} samples take {_gib(memory)} of {_gib(budget)}"
    return Representation("features", reason, memory)


def _gib(size: int) -> str:
    return f"{size / _GIB:.2g} GiB"
