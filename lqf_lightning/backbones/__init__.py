"""Any timm or torchvision image classifier with a new head, and what can be done to it before training."""

from lqf_lightning.backbones.activations import swap_activations as swap_activations
from lqf_lightning.backbones.backbone import Backbone as Backbone
from lqf_lightning.backbones.create import create_backbone as create_backbone
from lqf_lightning.backbones.features import penultimate_features as penultimate_features
from lqf_lightning.backbones.fold import fold_batch_norm as fold_batch_norm
from lqf_lightning.backbones.groups import layer_groups as layer_groups
