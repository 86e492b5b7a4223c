"""How far a network is from an old one, over the classes that both know."""

from typing import Any

import torch
from torch import Tensor

from lqf_lightning.congruence.distances import kl_distance, logit_difference_inhibition, logit_distance
from lqf_lightning.teachers import SharedClasses


def shared_distance(options: Any, shared: SharedClasses, logits: Tensor, outputs: Tensor, target: Tensor) -> Tensor:
    """The distance that the options of `FocalDistillation` describe.

    Args:
        options: Its hyper-parameters.
        shared: The classes that both know.
        logits: Outputs of the network (B, C).
        outputs: Outputs of the old one (B, C_old).
        target: Class positions (B,).

    Returns:
        One number per sample (B,).
    """
    new, old = logits, outputs
    columns = shared.new_columns.to(target.device)
    if not shared.same:
        new, old = logits[:, columns], outputs[:, shared.old_columns.to(target.device)]
    if options.distance == "kl":
        return kl_distance(new, old, options.temperature)
    if options.distance == "logits":
        return logit_distance(new, old, options.class_reduction, options.centered)
    label = None
    if options.exclude_target:
        here = columns == target.unsqueeze(1)  # (B, S)
        label = torch.where(here.any(1), here.int().argmax(1), -1)
    return logit_difference_inhibition(new, old, options.margin, options.power, options.top_k, label, options.one_sided)
