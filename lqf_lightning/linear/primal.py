"""The exact optimum in feature space: the last layer, a small network's whole Jacobian, or a sketch."""

from functools import cached_property

import torch
from torch import Tensor

from lqf_lightning.linear.features import Features, first_copies
from lqf_lightning.linear.leave_one_out import LeaveOneOut, RemovalGeometry, leave_one_out
from lqf_lightning.linear.normal_equations import NormalEquations
from lqf_lightning.linear.problem import QuadraticProblem
from lqf_lightning.linear.reducer import Reducer
from lqf_lightning.linear.solution import Solution


class PrimalFactor:
    r"""One factorization of :math:`\sum_i a_i \Phi_i^T \Phi_i + \lambda I`, from which everything follows.

    The counterpart of `DualFactor` for D features instead of N = n C rows: D x D matrices, sums over samples that ranks
    share in one reduction, every rank working on its own samples. What it gives is gathered and the same on all ranks:
    rows by ascending index, samples that padding repeats counted once. The intercept has columns without penalty.

    With :math:`P_i = \Psi_i A^{-1} \Psi_i^T` leverages are :math:`h_i = a_i P_i`. They lose digits where
    :math:`1 - h_i` is below 1e-8; with so small a ridge on more features than rows use the dual form.

    Args:
        problem: This rank's samples, with the ridge of the whole.
        features: Their features.
        reducer: Sums and gathers over ranks; None for a single process.

    Attributes:
        problem: The samples of all ranks, by index.
        index: Their indices (N,).

    Raises:
        ValueError: Features and problem do not fit together, the index is missing on several ranks, or the matrix is
            singular in double precision.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), ridge=1.0)
        >>> factor = PrimalFactor(problem, Features(torch.ones(2, 1, 1)))
        >>> factor.solution().outputs.flatten()  # 4 / (2 + 1)
        tensor([1.3333, 1.3333], dtype=torch.float64)
        >>> leave_one_out(factor).prediction.flatten()
        tensor([1.5000, 0.5000], dtype=torch.float64)
    """

    def __init__(self, problem: QuadraticProblem, features: Features, reducer: Reducer | None = None) -> None:
        self.reducer, self.features = reducer or Reducer(), features
        self.own = features.positions(self.reducer)
        packed, self.index = self.reducer.gather_rows(_pack(problem), self.own)
        self.problem = _unpack(problem, packed)
        kept = first_copies(self.own, self.reducer)
        linear = None if problem.linear is None else problem.linear * kept[:, None]
        # An intercept of its own would want a sample of positive weight on every rank.
        self._local = problem.with_(weight=problem.root_weight[:, 0].square() * kept, linear=linear, intercept=False)
        equations = NormalEquations.empty(problem, features.rows)
        equations.add(self._local, features.rows)
        self.equations = equations.reduced(self.reducer)
        self.lower = self.equations.factor()

    @cached_property
    def weights(self) -> Tensor:
        """The optimum u (E, columns): dw by feature, then the intercept, if there is one."""
        return torch.cholesky_solve(self.equations.right, self.lower)

    def solution(self) -> Solution:
        """The optimum on all samples.

        Returns:
            Coefficients and predictions of all samples, by index; the direction is called "features" (D, columns). The
            certificate comes from a fresh pass over the features.
        """
        local = self._local
        outputs = self._evaluate(self.features.rows) + local.initial.double()
        excess, linear = outputs - local.target.double(), local.linear_terms
        force = local.root_weight.square() * excess + linear
        losses = 0.5 * local.root_weight.square() * excess.square() + linear * (outputs - local.initial.double())
        gradient = torch.cat([self._pull(force), losses.sum().expand(1, self.weights.shape[1])])
        gradient = self.reducer.sum_(gradient)
        penalty = self.equations.penalty[:, None] * self.weights
        objective = float(gradient[-1, 0]) + 0.5 * float((penalty * self.weights).sum())
        whole, _ = self.reducer.gather_rows(outputs, self.own)
        excess = whole - self.problem.target.double()
        weight = self.problem.root_weight.square()
        return Solution(
            coefficients=-(weight * excess + self.problem.linear_terms) / self.problem.ridge,
            intercept=self._intercept,
            outputs=whole,
            certificate=self.equations.certificate(self.weights, gradient[:-1] + penalty, objective),
            direction={"features": self.weights[: self.features.rows.shape[2]]},
        )

    def predict(self, rows: Tensor, initial: Tensor) -> Tensor:
        """Outputs of the optimum on other samples of this rank.

        Args:
            rows: Their features (m, C, D) or (m, 1, D).
            initial: Outputs of the network before training (m, C).

        Returns:
            Predictions (m, C).
        """
        return initial.double() + self._evaluate(rows)

    @cached_property
    def degrees_of_freedom(self) -> float:
        """Effective number of parameters, the sum of all leverages over samples and outputs, intercept included."""
        inverse = torch.cholesky_inverse(self.lower)
        return float((inverse * self.equations.matrix).sum()) * self.equations.right.shape[1]

    def geometry(self, cross: Features | None = None) -> RemovalGeometry:
        """What decides how removed samples move the optimum, see `leave_one_out`.

        Args:
            cross: Features of this rank's part of other samples, for the change of their outputs.

        Returns:
            The blocks of the samples of all ranks, by index.
        """
        watched = None if cross is None else self._second_moment(cross)
        local, width = self._local, self.features.rows.shape[2]
        parts = []
        for part, design in self.equations.designs(self.features.rows):
            weight = local.root_weight[part, :, None]
            half = torch.linalg.solve_triangular(self.lower, design.flatten(0, 1).T, upper=False)
            moves = torch.linalg.solve_triangular(self.lower.T, half, upper=True)
            half, moves = (m.unflatten(1, design.shape[:2]).permute(1, 0, 2) for m in (half, moves))
            leverage = weight.square() * (half.mT @ half)
            inverse = (torch.eye(design.shape[1]).to(leverage) - leverage) / local.ridge
            squares = weight.square() * (moves[:, :width].mT @ moves[:, :width])
            border = weight * moves[:, width:] if self.equations.intercept else torch.zeros_like(inverse)
            entries = [inverse, squares, border]
            if watched is not None:
                entries.append(weight.square() * (moves.mT @ (watched @ moves)))
            parts.append(torch.stack(entries, 1))
        whole, _ = self.reducer.gather_rows(torch.cat(parts), self.own)
        return RemovalGeometry(*whole.unsqueeze(2).unbind(1))

    @property
    def _intercept(self) -> Tensor:
        if self.equations.intercept:
            return self.weights[self.features.rows.shape[2] :].reshape(-1)
        return self.weights.new_zeros(self.problem.outputs)

    def _evaluate(self, rows: Tensor) -> Tensor:
        parts = [(design @ self.weights).flatten(1) for _, design in self.equations.designs(rows)]
        return torch.cat(parts)

    def _pull(self, force: Tensor) -> Tensor:
        sides = force.reshape(len(force), self.equations.coupled, -1)
        result = torch.zeros_like(self.weights)
        for part, design in self.equations.designs(self.features.rows):
            result += design.flatten(0, 1).T @ sides[part].flatten(0, 1)
        return result

    def _second_moment(self, cross: Features) -> Tensor:
        own = cross.positions(self.reducer)
        kept = first_copies(own, self.reducer).double()
        result = torch.cat([torch.zeros_like(self.lower), self.lower.new_zeros(1, len(self.lower))])
        for part, design in self.equations.designs(cross.rows):
            result[:-1] += (design * kept[part, None, None]).flatten(0, 1).T @ design.flatten(0, 1)
        result[-1] += kept.sum()
        result = self.reducer.sum_(result)
        return result[:-1] / result[-1]


def leave_one_out_primal(
    problem: QuadraticProblem,
    features: Features,
    cross: Features | None = None,
    reducer: Reducer | None = None,
) -> LeaveOneOut:
    """Solve in feature space and remove every sample in turn.

    Args:
        problem: This rank's samples.
        features: Their features.
        cross: Features of this rank's part of the samples whose outputs are watched.
        reducer: Sums and gathers over ranks; None for a single process.

    Returns:
        The result for the samples of all ranks, by ascending index, the same on every rank.

    Example:
        >>> import torch
        >>> problem = QuadraticProblem(torch.zeros(2, 1), torch.tensor([[1.0], [3.0]]), ridge=1.0)
        >>> leave_one_out_primal(problem, Features(torch.ones(2, 1, 1))).residual.flatten()
        tensor([-0.5000,  2.5000], dtype=torch.float64)
    """
    return leave_one_out(PrimalFactor(problem, features, reducer), cross)


def _pack(problem: QuadraticProblem) -> Tensor:
    initial, target = problem.initial.double(), problem.target.double()
    return torch.cat([initial, target, problem.linear_terms, problem.root_weight.square()], 1)


def _unpack(like: QuadraticProblem, packed: Tensor) -> QuadraticProblem:
    sizes = [like.outputs, like.outputs, like.outputs, 1]
    initial, target, linear, weight = torch.split(packed, sizes, 1)
    return like.with_(initial=initial, target=target, linear=linear, weight=weight[:, 0])
