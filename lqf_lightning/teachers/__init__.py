"""Networks that answer while another one trains."""

from lqf_lightning.teachers.eman import EMANTeacher as EMANTeacher
from lqf_lightning.teachers.ensemble import EnsembleTeacher as EnsembleTeacher
from lqf_lightning.teachers.frozen import FrozenTeacher as FrozenTeacher
from lqf_lightning.teachers.key_queue import KeyQueue as KeyQueue
from lqf_lightning.teachers.momentum import MomentumSchedule as MomentumSchedule
from lqf_lightning.teachers.shared_classes import SharedClasses as SharedClasses
from lqf_lightning.teachers.stored import StoredPredictions as StoredPredictions
from lqf_lightning.teachers.teacher import Teacher as Teacher
from lqf_lightning.teachers.view import View as View

Reference = FrozenTeacher | EnsembleTeacher | StoredPredictions
