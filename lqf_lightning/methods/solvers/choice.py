"""Which class solves the problem of a run."""

from typing import TYPE_CHECKING

from lqf_lightning.methods.solvers.conjugate_gradients import ConjugateGradients
from lqf_lightning.methods.solvers.kernel import KernelSolver
from lqf_lightning.methods.solvers.solver import Solver, SolverName
from lqf_lightning.methods.solvers.stochastic import StochasticDescent

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

_SOLVERS: dict[str, type[Solver]] = {"sgd": StochasticDescent, "cg": ConjugateGradients, "kernel": KernelSolver}


def make_solver(name: SolverName, method: "LQF") -> Solver:
    """Build a solver.

    Args:
        name: "sgd", "cg" or "kernel".
        method: The method that it serves.

    Returns:
        The solver.
    """
    return _SOLVERS[name](method)
