"""Training methods: LightningModules around a backbone."""

from lqf_lightning.methods.byol import BYOL as BYOL
from lqf_lightning.methods.finetune import Finetune as Finetune
from lqf_lightning.methods.fixmatch import FixMatch as FixMatch
from lqf_lightning.methods.focal_distillation import FocalDistillation as FocalDistillation
from lqf_lightning.methods.lqf import LQF as LQF
from lqf_lightning.methods.method import Method as Method
from lqf_lightning.methods.mixed_privacy import MixedPrivacy as MixedPrivacy
from lqf_lightning.methods.moco import MoCo as MoCo
from lqf_lightning.methods.self_distillation import SelfDistillation as SelfDistillation
from lqf_lightning.methods.supmoco import SupMoCo as SupMoCo
