"""Which class solves the problem of a run."""

import logging
from typing import TYPE_CHECKING

from lqf_lightning.methods.solvers.conjugate_gradients import ConjugateGradients
from lqf_lightning.methods.solvers.kernel import KernelSolver
from lqf_lightning.methods.solvers.solver import Solver, SolverName
from lqf_lightning.methods.solvers.stochastic import StochasticDescent

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
_SOLVERS: dict[str, type[Solver]] = {
    "sgd": StochasticDescent,
    "cg": ConjugateGradients,
    "kernel": KernelSolver,
    "auto": ConjugateGradients,  # until the number of samples is known
}
_SMALL = 2_000  # rows whose exact kernel costs less than a few iterations


def make_solver(name: SolverName, method: "LQF") -> Solver:
    """Build a solver.

    Args:
        name: "sgd", "cg", "kernel" or "auto".
        method: The method that it serves.

    Returns:
        The solver.
    """
    return _SOLVERS[name](method)


def choose_solver(method: "LQF") -> Solver:
    """Build the solver that suits the number of training samples, and say why.

    Args:
        method: The method, attached to a trainer whose data module is set up.

    Returns:
        The kernel for few rows of the Jacobian, else conjugate gradients.
    """
    samples, classes = len(method.solver.data_module().fixed_train_dataloader().dataset), len(method.classes)
    name: SolverName = "kernel" if samples * classes <= _SMALL or method.hparams["tradeoff"] is not None else "cg"
    log.info("solver=%s: %d samples x %d classes, the kernel is for up to %d", name, samples, classes, _SMALL)
    return make_solver(name, method)
