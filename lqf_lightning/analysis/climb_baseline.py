"""The scrub that climbs on the loss of the forgotten samples."""

import logging
import math

import torch
from torch import Tensor

from lqf_lightning.analysis.cohort_split import CohortSplit
from lqf_lightning.analysis.descend_baselines import Descent
from lqf_lightning.analysis.mean_gradient import mean_gradient
from lqf_lightning.analysis.network_scrub import NetworkScrub
from lqf_lightning.data import Batch
from lqf_lightning.methods import Finetune

log = logging.getLogger(__name__)
Tensors = dict[str, Tensor]


def climb_on(split: CohortSplit, method: Finetune, options: NetworkScrub, weights: Tensors) -> Descent:
    """Climb on the loss of the forgotten samples, with all of them at every step, up to a loss that says enough.

    Nothing bounds the loss from above, so that climbing destroys the network in the end. It stops at the loss of a
    model that knows nothing; gradients are cut to a length, and a step that goes far beyond the goal is taken back,
    and the rate halved.

    Args:
        split: What is forgotten and what stays.
        method: The method, whose loss is meant and which itself is left alone.
        options: Those of the scrub.
        weights: Where to begin, by parameter name.

    Returns:
        Where the ascent has ended.
    """
    ceiling = chance_loss(method) if options.ceiling is None else options.ceiling
    batches, count = split.batches(split.forgotten), len(split.forgotten)
    state, rate, reached = Descent(dict(weights), len(split.retained)), options.learning_rate, -math.inf
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    before, gradient = dict(weights), dict(velocity)

    def plain_loss(logits: Tensor, batch: Batch) -> Tensor:
        return method.loss(logits, batch.target)

    for _ in range(options.max_steps + 1):
        loss, found = mean_gradient(method, plain_loss, state.weights, batches, count)
        state.seen += count
        if math.isfinite(loss) and loss <= 2 * max(ceiling, reached):
            reached, before, gradient = loss, dict(state.weights), found
            state.note(loss)
        else:
            rate, velocity = rate / 2, {name: torch.zeros_like(weight) for name, weight in weights.items()}
        if reached >= ceiling or state.steps == options.max_steps:
            break
        shrink = min(1.0, options.clip / max(_length(gradient), 1e-30))
        velocity = {name: options.momentum * v + shrink * gradient[name] for name, v in velocity.items()}
        state.weights = {name: weight + rate * velocity[name] for name, weight in before.items()}
        state.steps += 1
    state.weights = before
    if reached < ceiling:
        log.warning(
            "gradient_ascent has stopped at a loss of %.3g on the forgotten samples, below %.3g. Set "
            "++callbacks.scrub.options.max_steps=%d", reached, ceiling, 10 * options.max_steps,
        )  # fmt: skip
    return state


def chance_loss(method: Finetune) -> float:
    r"""The loss of the best answer that does not look at the image, for classes that are equally frequent.

    Args:
        method: The method.

    Returns:
        log C in nats for cross-entropy, :math:`\frac{\alpha^2}{2} (1 - \frac1C)` for the squared loss.
    """
    classes = len(method.classes)
    if method.hparams["loss"] == "cross_entropy":
        return math.log(classes)
    return 0.5 * float(method.hparams["target_scale"]) ** 2 * (1 - 1 / classes)


def _length(gradient: Tensors) -> float:
    return math.sqrt(sum(float(slope.double().square().sum()) for slope in gradient.values()))
