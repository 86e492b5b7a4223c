"""The scrubs that are nothing but more training, on the retained samples or with wrong labels on the others."""

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lqf_lightning.analysis.cohort_split import CohortSplit
from lqf_lightning.analysis.mean_gradient import mean_gradient
from lqf_lightning.analysis.network_scrub import NetworkScrub
from lqf_lightning.data import Batch
from lqf_lightning.data.seeding import mix_seed
from lqf_lightning.methods import Finetune
from lqf_lightning.progress import track

Tensors = dict[str, Tensor]
_TRAINING, _STEP = 3, 5  # evaluations of the network per sample: of a step of training it, and of the unit of work


@dataclass
class Descent:
    """How far a training has come.

    Attributes:
        weights: By parameter name.
        retained: Number of retained samples, the unit of work.
        steps: Taken.
        seen: Samples that gradients have been taken on.
        curve: Work and loss by epoch.
    """

    weights: Tensors
    retained: int
    steps: int = 0
    seen: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)

    @property
    def passes(self) -> float:
        """Work in passes of linearized training over the retained samples."""
        return _TRAINING * self.seen / _STEP / self.retained

    def note(self, loss: float) -> None:
        """Add a point to the curve.

        Args:
            loss: At this point.
        """
        self.curve.append({"passes": self.passes, "loss": loss})


def train_on(
    split: CohortSplit, method: Finetune, options: NetworkScrub, weights: Tensors, *, wrong_labels: bool
) -> Descent:
    """Go on training by stochastic gradient descent with momentum, at a constant rate and without weight decay.

    The samples come as they are evaluated, in an order that depends on the seed alone; normalization layers keep their
    statistics and dropout is off. A batch is the same set of samples for any number of ranks.

    Args:
        split: What is forgotten and what stays.
        method: The method, whose loss is trained and which itself is left alone.
        options: Those of the scrub.
        weights: Where to begin, by parameter name.
        wrong_labels: Whether forgotten samples take part, each with one wrong label drawn by lot; else they do not.

    Returns:
        Where the training has ended.

    Raises:
        ValueError: The loss is no longer a number.
    """
    indices = torch.cat([split.retained, split.forgotten]).sort().values if wrong_labels else split.retained
    size = min(options.batch_size or split.batch_size, len(indices))
    samples, state = split.batches(indices), Descent(dict(weights), len(split.retained))
    velocity = {name: torch.zeros_like(weight) for name, weight in weights.items()}
    counts = [min(size, len(indices) - at) for at in range(0, len(indices), size)]
    for epoch in track(range(options.epochs), f"{options.name}: epochs"):
        total = 0.0
        for count, own in zip(counts, split.shuffled(samples, size, options.seed, epoch), strict=True):
            batch = _mislabeled(own, split, len(method.classes), options.seed) if wrong_labels else own
            loss, gradient = mean_gradient(method, method.training_loss, state.weights, [batch], count)
            total += loss * count
            for name, slope in gradient.items():
                velocity[name].mul_(options.momentum).add_(slope)
                state.weights[name] = state.weights[name] - options.learning_rate * velocity[name]
            state.steps, state.seen = state.steps + 1, state.seen + count
        state.note(total / len(indices))
        if not math.isfinite(total):
            raise ValueError(
                f"{options.name} has diverged in epoch {epoch + 1}, at the rate {options.learning_rate:g}. Set "
                f"++callbacks.scrub.options.learning_rate={options.learning_rate / 10:g}"
            )
    return state


def _mislabeled(batch: Batch, split: CohortSplit, classes: int, seed: int) -> Batch:
    members = torch.isin(batch.index.cpu(), split.forgotten)
    shift = [1 + mix_seed(seed, int(index)) % (classes - 1) for index in batch.index]
    moved = batch.target + torch.tensor(shift, dtype=batch.target.dtype).to(batch.target)
    return batch._replace(target=torch.where(members.to(batch.target.device), moved % classes, batch.target))
