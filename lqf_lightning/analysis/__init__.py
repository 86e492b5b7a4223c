"""What is computed of a whole run: its linear-quadratic problem, and what follows from it."""

from lqf_lightning.analysis.linear_twin import linear_twin as linear_twin
from lqf_lightning.analysis.run_problem import HeldOut as HeldOut
from lqf_lightning.analysis.run_problem import RunProblem as RunProblem
from lqf_lightning.analysis.run_problem import problem_of_run as problem_of_run
from lqf_lightning.analysis.sample_scores import SampleScores as SampleScores
from lqf_lightning.analysis.sample_scores import score_samples as score_samples
