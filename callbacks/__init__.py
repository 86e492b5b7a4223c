"""Observers of a run: callbacks that look and report, and never change training."""

from .forgetting_bounds import ForgettingBounds as ForgettingBounds
from .knn import KNN as KNN
from .learned_penalty import LearnedPenalty as LearnedPenalty
from .learning_curves import LearningCurves as LearningCurves
from .learning_speed import LearningSpeed as LearningSpeed
from .linear_probe import LinearProbe as LinearProbe
from .memorization import Memorization as Memorization
from .negative_flips import NegativeFlips as NegativeFlips
from .regularization_path import RegularizationPath as RegularizationPath
from .sample_information import SampleInformation as SampleInformation
from .scrub import Scrub as Scrub
from .tradeoff_curve import TradeoffCurve as TradeoffCurve
from .training_time import TrainingTime as TrainingTime
from .usable_information import UsableInformation as UsableInformation
