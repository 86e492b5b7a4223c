"""Observers of a run: callbacks that look and report, and never change training."""

from .learning_curves import LearningCurves as LearningCurves
from .linear_probe import LinearProbe as LinearProbe
from .regularization_path import RegularizationPath as RegularizationPath
