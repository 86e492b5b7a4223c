"""The problem of some of the samples, from the kernel of all: no pass through the network."""

from collections.abc import Mapping

import torch
from torch import Tensor

from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.problem import QuadraticProblem


def restrict_problem(problem: QuadraticProblem, positions: Tensor) -> QuadraticProblem:
    """Keep some samples; the ridge of the sum form stays.

    Args:
        problem: The problem of all samples.
        positions: Those to keep (s,), int64, in the order that they shall have.

    Returns:
        The problem of these.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]]), ridge=1.0)
        >>> restrict_problem(problem, torch.tensor([2, 0])).target.flatten().tolist()
        [3.0, 1.0]
    """
    parts = {name: getattr(problem, name) for name in ("initial", "target", "weight", "linear")}
    return problem.with_(**{name: None if part is None else part[positions] for name, part in parts.items()})


def restrict_kernel(kernel: Kernel, *, rows: Tensor | None = None, columns: Tensor | None = None) -> Kernel:
    """Keep some samples of a kernel.

    Args:
        kernel: The kernel of all.
        rows: Samples to keep among the rows (s,), int64; None means all.
        columns: The same for the columns.

    Returns:
        The kernel of these.

    Example:
        >>> import torch
        >>> kernel = Kernel({"all": torch.arange(9.0).reshape(1, 3, 3)}, outputs=1)
        >>> restrict_kernel(kernel, rows=torch.tensor([1]), columns=torch.tensor([0, 2])).groups["all"].tolist()
        [[[3.0, 5.0]]]
    """
    groups: Mapping[str, Tensor] = kernel.groups
    for axis, chosen in ((1, rows), (2, columns)):
        if chosen is not None:
            groups = {name: _pick(matrix, axis, chosen, kernel.coupled) for name, matrix in groups.items()}
    return Kernel(groups, kernel.outputs, kernel.form)


def _pick(matrix: Tensor, axis: int, chosen: Tensor, coupled: int) -> Tensor:
    # Rows of a sample lie together.
    chosen = chosen.to(matrix.device)
    index = (coupled * chosen.unsqueeze(1) + torch.arange(coupled, device=matrix.device)).flatten()
    return matrix.index_select(axis, index)
