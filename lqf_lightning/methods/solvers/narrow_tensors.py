"""Parameters that are too few for what a trace kernel believes of them."""

import logging
from dataclasses import replace
from typing import TYPE_CHECKING

from lqf_lightning.linear.learned_penalty import LearnedPenalty

if TYPE_CHECKING:
    from lqf_lightning.methods.lqf import LQF

log = logging.getLogger(__name__)
NARROW = "narrow"  # name of their penalty group
_FROZEN = 1e-9  # scale of what does not move, the others' being about 1


def set_narrow_apart(method: "LQF", rows: int) -> None:
    """Put tensors below the head that have fewer entries than the Jacobian has rows into a group of their own.

    In the network all outputs share a tensor; in a trace kernel each output has one of its own. Where entries are few
    (the scales of norms, depthwise convolutions, the stem), the kernel of the network is concentrated on as many
    directions, and its eigenvalues there exceed those of the trace kernel by up to the number of rows per entry. Then
    a small part of the trace governs the model, and the trace kernel neither predicts nor preconditions it: such
    tensors are frozen where a trace kernel chooses the penalty. The head is the same in both.

    Args:
        method: The method, its penalty not settled yet; `penalty_groups` changes.
        rows: Samples times classes.
    """
    deltas, head = method.linearized.deltas, set(method.backbone.groups["head"])
    narrow = {name for name, delta in deltas.items() if delta.numel() < rows and name not in head}
    if not narrow:
        return
    log.info("frozen: %d of %d parameter tensors, with fewer entries than %d images x classes", len(narrow),
             len(deltas), rows)  # fmt: skip
    wide = {group: tuple(n for n in names if n not in narrow) for group, names in method.penalty_groups.items()}
    method.penalty_groups = {group: names for group, names in wide.items() if names}
    method.penalty_groups[NARROW] = tuple(name for name in deltas if name in narrow)


def with_narrow(found: LearnedPenalty) -> LearnedPenalty:
    """Add the group that does not move to a penalty.

    Args:
        found: The penalty of the others.

    Returns:
        The penalty of all.
    """
    return replace(found, scales=found.scales | {NARROW: _FROZEN}, share=found.share | {NARROW: 0.0})
