"""How the linear-quadratic problem of a run is solved: by stochastic steps, conjugate gradients or its kernel."""

from lqf_lightning.methods.solvers.acceleration import Acceleration as Acceleration
from lqf_lightning.methods.solvers.choice import choose_solver as choose_solver
from lqf_lightning.methods.solvers.choice import make_solver as make_solver
from lqf_lightning.methods.solvers.conjugate_gradients import ConjugateGradients as ConjugateGradients
from lqf_lightning.methods.solvers.kernel import KernelSolver as KernelSolver
from lqf_lightning.methods.solvers.outlook import Outlook as Outlook
from lqf_lightning.methods.solvers.solver import Solver as Solver
from lqf_lightning.methods.solvers.solver import SolverName as SolverName
from lqf_lightning.methods.solvers.stochastic import StochasticDescent as StochasticDescent
