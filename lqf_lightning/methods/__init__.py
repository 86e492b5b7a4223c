"""Training methods: LightningModules around a backbone."""

from lqf_lightning.methods.finetune import Finetune as Finetune
from lqf_lightning.methods.focal_distillation import FocalDistillation as FocalDistillation
from lqf_lightning.methods.lqf import LQF as LQF
from lqf_lightning.methods.method import Method as Method
