"""What groups of samples contributed: the optimum without all of a group, exactly."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lqf_lightning.linear.dual import DualFactor
from lqf_lightning.linear.kernel import Kernel
from lqf_lightning.linear.solution import Solution


@dataclass(frozen=True)
class Removal:
    r"""The optimum on all samples minus the optimum without some.

    Attributes:
        factor: The factorization of the problem with all samples.
        positions: The samples removed (S,).
        coefficients: Change of the coefficients, :math:`\beta - \beta_{-S}` (n, C): the movement
            :math:`dw - dw_{-S} = M^{-1} J^T (\beta - \beta_{-S})`.
        intercept: :math:`b - b_{-S}` (C,).
        residual: :math:`y - f_{-S}` on the removed samples (S, C).
        weight_change: :math:`\lVert dw - dw_{-S} \rVert_M^2`.
        cook: Squared change of (dw, b) in the norm of the Hessian of the objective.
    """

    factor: DualFactor
    positions: Tensor
    coefficients: Tensor
    intercept: Tensor
    residual: Tensor
    weight_change: float
    cook: float

    def output_change(self, cross: Kernel) -> Tensor:
        """How outputs on other samples move.

        Args:
            cross: Kernel with the rows of the other samples and the columns of the training samples.

        Returns:
            `f - f_{-S}` (m, C).
        """
        system = self.factor.system
        moved = system.kernel.join(system.cross_matrix(cross) @ system.kernel.split(self.coefficients))
        return moved + self.intercept


@dataclass(frozen=True)
class LeaveGroupOut:
    """The problem without group g, for every g, in the order of the groups.

    Attributes:
        residual: By group, `y - f_{-S}` on its samples (S, C).
        weight_change: As in `LeaveOneOut`, by group (g,).
        intercept_change: By group (g, C).
        cook: By group (g,).
        function_change: By group (g,); None if no other samples were given.
    """

    residual: tuple[Tensor, ...]
    weight_change: Tensor
    intercept_change: Tensor
    cook: Tensor
    function_change: Tensor | None


def remove_group(factor: DualFactor, positions: Tensor, solution: Solution | None = None) -> Removal:
    r"""Remove some samples at once, without solving the rest again.

    Deleting the rows S of the dual system gives :math:`\beta - \beta_{-S} = A^{1/2} G_{:S} t` with
    :math:`t = G_{SS}^{-1} A_S^{-1/2} \beta_S`, as for a single sample. The cost is quadratic in n, cubic in the group.

    Args:
        factor: The solved problem.
        positions: Samples to remove, positions in the problem (S,), int64, each once.
        solution: The optimum, to spare its repetition over groups; None means `factor.solution()`.

    Returns:
        The change of the optimum.

    Example:
        >>> import torch
        >>> from lqf_lightning.linear.problem import QuadraticProblem
        >>> problem = QuadraticProblem(torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [6.0]]), ridge=1.0)
        >>> factor = DualFactor(problem, Kernel({"all": torch.ones(1, 3, 3)}, outputs=1))
        >>> removal = remove_group(factor, torch.tensor([0, 1]))  # 9/4 is fitted to all, 3 to the last one alone
        >>> [round(number, 9) for number in removal.residual.flatten().tolist()], round(removal.weight_change, 9)
        ([-2.0, -1.0], 0.5625)
    """
    system, problem = factor.system, factor.problem
    _refuse_positions(factor, positions)
    solution = factor.solution() if solution is None else solution
    sides = system.kernel.split(_coefficients(solution))
    coupled = system.kernel.coupled
    present = positions[problem.root_weight[positions, 0] > 0]
    rows = (coupled * present.unsqueeze(1) + torch.arange(coupled, device=present.device)).flatten()
    own = factor.inverse[:, rows][:, :, rows]
    driving = torch.linalg.solve(own, sides[:, rows] / system.root[rows])
    change = factor.inverse[:, :, rows] @ driving
    length = float((driving * (own @ driving)).sum())
    coefficients = system.kernel.join(system.root * change)
    intercept = (factor.border[:, :, rows] @ driving).flatten()
    moved = system.kernel.join(system.matrix @ system.kernel.split(coefficients)) + intercept
    return Removal(
        factor=factor,
        positions=positions,
        coefficients=coefficients,
        intercept=intercept,
        residual=(problem.target.double() - solution.outputs + moved)[positions],
        weight_change=max(0.0, length - problem.ridge * float(change.square().sum())),
        cook=max(0.0, float(driving.square().sum()) - problem.ridge * length),
    )


def leave_group_out(
    factor: DualFactor,
    groups: Sequence[Tensor],
    cross: Kernel | None = None,
    watch: Callable[[Sequence[Tensor]], Iterable[Tensor]] = iter,
) -> LeaveGroupOut:
    """Remove every group in turn; groups of one give `leave_one_out`.

    Args:
        factor: The solved problem.
        groups: Positions of the samples of each group (S,), int64; groups may overlap.
        cross: Kernel with the rows of other samples, whose outputs are watched.
        watch: Wraps the groups, to report progress.

    Returns:
        See there.

    Raises:
        ValueError: There is no group.
    """
    if len(groups) == 0:
        raise ValueError("got no group to leave out, expected at least one")
    solution, function = factor.solution(), []
    removals = []
    for positions in watch(groups):
        removal = remove_group(factor, positions, solution)
        if cross is not None:
            function.append(removal.output_change(cross).square().sum(1).mean())
        removals.append((removal.residual, removal.weight_change, removal.intercept, removal.cook))
    residuals, weights, intercepts, cooks = zip(*removals, strict=True)
    return LeaveGroupOut(
        residual=residuals,
        weight_change=residuals[0].new_tensor(weights),
        intercept_change=torch.stack(intercepts),
        cook=residuals[0].new_tensor(cooks),
        function_change=torch.stack(function) if function else None,
    )


def _coefficients(solution: Solution) -> Tensor:
    if solution.coefficients is None:
        raise ValueError("removing samples needs a solution with coefficients")
    return solution.coefficients


def _refuse_positions(factor: DualFactor, positions: Tensor) -> None:
    problem = factor.problem
    known = bool(((positions >= 0) & (positions < problem.samples)).all())
    if len(positions) == 0 or not known or len(set(positions.tolist())) < len(positions):
        raise ValueError(f"a group needs different positions below {problem.samples}, got {positions.tolist()[:10]}")
    kept = problem.root_weight[:, 0].index_fill(0, positions, 0.0)
    if problem.intercept and not bool(kept.any()):
        raise ValueError("an intercept cannot be fitted without samples: the group holds all that have a weight")
    absent = problem.root_weight[positions, 0] == 0
    if bool(problem.linear_terms[positions][absent].any()):
        raise ValueError("a sample of weight 0 with a linear term cannot be removed; give it a small positive weight")
