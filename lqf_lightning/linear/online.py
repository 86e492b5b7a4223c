"""An optimum that follows the data: samples and classes are added, or taken away, without looking back."""

import torch
from torch import Tensor

from lqf_lightning.linear.features import Features, first_copies
from lqf_lightning.linear.normal_equations import NormalEquations
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.solution import Solution


class OnlinePrimal:
    r"""Recursive solution in feature space, :math:`H_t = H_{t-1} + \sum_i a_i \Phi_i^T \Phi_i`, and so for the rest.

    Only sums are kept, so memory does not grow with the data, and the optimum after any order and any chunking is that
    of all samples at once, for the fixed ridge of the sum form (a mean loss would change it with every sample). What is
    taken away again with `remove` has never been there.

    With features that the outputs share (a linear probe) new classes are further columns, `add_outputs`. With features
    of the whole network they are not: every new output has a Jacobian of its own with respect to the weights that all
    outputs share, on the old samples too, which are no longer at hand. Keep those and solve again.

    Args:
        reducer: Sums over ranks, each of which adds its own samples; None for a single process.

    Example:
        >>> import torch
        >>> online = OnlinePrimal()
        >>> for target in (1.0, 3.0):
        ...     problem = QuadraticProblem(torch.zeros(1, 1), torch.tensor([[target]]), ridge=1.0)
        ...     online.add(problem, Features(torch.ones(1, 1, 1)))
        >>> online.solution().direction["features"]  # 4 / (2 + 1)
        tensor([[1.3333]], dtype=torch.float64)
    """

    def __init__(self, reducer: Reducer | None = None) -> None:
        self.reducer = reducer or Reducer()
        self._equations: NormalEquations | None = None
        self._first = torch.zeros(0)
        self._mass = torch.zeros(())

    def add(self, problem: QuadraticProblem, features: Features) -> None:
        """Add samples of this rank; every rank has to call, and samples that padding repeats count once per call.

        Args:
            problem: The samples; ridge and intercept are those of the first call.
            features: Their features.
        """
        self._change(problem, features, 1.0)

    def remove(self, problem: QuadraticProblem, features: Features) -> None:
        """Take samples away that have been added; every rank has to call.

        Args:
            problem: The samples with their targets and weights.
            features: Their features.
        """
        self._change(problem, features, -1.0)

    def add_outputs(self, targets: Tensor, start: Tensor | None = None) -> None:
        """Add outputs, for which all samples so far have the same target.

        Args:
            targets: Target of each new output on the samples so far (k,), 0 for one-hot vectors.
            start: Weights of the new outputs before training (E, k), the intercept's behind the others; None means 0.
                New samples are to have the corresponding `initial` outputs.

        Raises:
            ValueError: The features are not shared by the outputs, or no sample was added.
        """
        equations = self._known()
        if equations.coupled > 1:
            raise ValueError(
                f"a new class changes {equations.coupled} coupled outputs of the whole network, whose Jacobian on the "
                "old samples is not kept: solve again on all samples, or use features that the outputs share"
            )
        goal = targets.double().to(equations.right)
        begin = equations.right.new_zeros(len(equations.right), len(goal)) if start is None else start.to(goal)
        curved = equations.matrix @ begin
        right = torch.outer(self._first, goal) - curved
        equations.right = torch.cat([equations.right, right], 1)
        equations.energy += 0.5 * (self._mass * goal.square() - 2 * goal * (self._first @ begin)).sum()
        equations.energy += 0.5 * (begin * curved).sum()

    def solution(self) -> Solution:
        """The optimum on all samples that were added.

        Returns:
            The direction, called "features" (D, columns), the intercept and a certificate. There are no coefficients
            and no predictions (0, C), since no sample is kept.
        """
        equations = self._known().reduced(self.reducer)
        weights = torch.cholesky_solve(equations.right, equations.factor())
        curved = equations.matrix @ weights + equations.penalty[:, None] * weights
        objective = equations.energy + (weights * (0.5 * curved - equations.right)).sum()
        width, outputs = len(weights) - equations.intercept * equations.coupled, equations.right.shape[1]
        intercept = weights.new_zeros(outputs * equations.coupled)
        return Solution(
            coefficients=None,
            intercept=weights[width:].reshape(-1) if equations.intercept else intercept,
            outputs=intercept.new_zeros(0, len(intercept)),
            certificate=equations.certificate(weights, curved - equations.right, float(objective)),
            direction={"features": weights[:width]},
        )

    def _change(self, problem: QuadraticProblem, features: Features, sign: float) -> None:
        kept = first_copies(features.positions(self.reducer), self.reducer)
        if self._equations is None:
            self._equations = NormalEquations.empty(problem, features.rows)
            self._first = self._equations.right.new_zeros(len(self._equations.right))
            self._mass = self._equations.energy.clone()
        equations = self._equations
        if (problem.ridge, problem.intercept) != (equations.ridge, equations.intercept):
            raise ValueError(
                f"the samples before have ridge {equations.ridge} and intercept={equations.intercept}, these have "
                f"{problem.ridge} and {problem.intercept}: the recursion is exact for a fixed ridge of the sum form"
            )
        weight = problem.root_weight[:, 0].square() * kept
        linear = None if problem.linear is None else problem.linear * kept[:, None]
        equations.add(problem.with_(weight=weight, linear=linear, intercept=False), features.rows, sign)
        self._mass += sign * weight.sum()
        if equations.coupled == 1:
            for part, design in equations.designs(features.rows):
                self._first += sign * (weight[part] @ design[:, 0])

    def _known(self) -> NormalEquations:
        if self._equations is None:
            raise ValueError("no sample was added; call add first")
        return self._equations
