"""Observers of a run: callbacks that look and report, and never change training."""

from .knn import KNN as KNN
from .learning_curves import LearningCurves as LearningCurves
from .linear_probe import LinearProbe as LinearProbe
from .negative_flips import NegativeFlips as NegativeFlips
from .regularization_path import RegularizationPath as RegularizationPath
from .tradeoff_curve import TradeoffCurve as TradeoffCurve
