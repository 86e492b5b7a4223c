"""A network as a linear-quadratic problem: the model, its curvature, its solutions."""

from lqf_lightning.linear.kfac import KFAC as KFAC
from lqf_lightning.linear.kfac import fit_kfac as fit_kfac
from lqf_lightning.linear.linearized import LinearizedModel as LinearizedModel
from lqf_lightning.linear.reducer import DistributedReducer as DistributedReducer
from lqf_lightning.linear.reducer import Reducer as Reducer
from lqf_lightning.linear.reducer import current_reducer as current_reducer
from lqf_lightning.linear.ridge_probe import RidgeProbe as RidgeProbe
from lqf_lightning.linear.top_curvature import top_curvature as top_curvature
