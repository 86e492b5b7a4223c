"""How fast a model relearns what it has forgotten: the time that a model without a trace of it would take."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor

from lqf_lightning.analysis.relearning_set import RelearningSet, load_relearning_set
from lqf_lightning.analysis.relearning_step import descend, stable_rate
from lqf_lightning.analysis.with_weights import with_weights
from lqf_lightning.congruence.evaluation_mode import evaluation_mode
from lqf_lightning.linear import current_reducer, exactly
from lqf_lightning.methods import Method

Measure = Literal["loss", "accuracy"]


@dataclass(frozen=True)
class RelearnOptions:
    """How models relearn.

    Attributes:
        learning_rate: Of plain stochastic gradient descent; None: 1 over the largest curvature for `lqf`, 0.01 for
            others.
        measure: What has to come back: the "loss" of the cohort, or its "accuracy".
        tolerance: How much short of the original's it may stay, as a share.
        samples: Training samples that are trained on, the cohort (or at most half as many of its members, by lot) among
            them.
        batch_size: Samples per step of all processes together.
        max_steps: Steps after which it is given up; the cohort is evaluated after each.
        seed: Of the lots and of the order.
    """

    learning_rate: float | None = None
    measure: Measure = "loss"
    tolerance: float = 0.05
    samples: int = 256
    batch_size: int = 32
    max_steps: int = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.measure not in ("loss", "accuracy"):
            raise ValueError(f"`measure` must be 'loss' or 'accuracy', got {self.measure!r}. Set measure=loss")
        if self.tolerance < 0:
            raise ValueError(f"`tolerance` cannot be negative, got {self.tolerance}. Set tolerance=0.05")
        if self.samples < 2 or self.batch_size < 1 or self.max_steps < 1:
            raise ValueError(
                f"got samples={self.samples}, batch_size={self.batch_size} and max_steps={self.max_steps}, expected at "
                "least 2, 1 and 1. Set samples=256, batch_size=32 and max_steps=200"
            )
        if self.learning_rate is not None and self.learning_rate <= 0:
            raise ValueError(f"`learning_rate` must be positive, got {self.learning_rate}. Set learning_rate=0.01")


class Relearning:
    """One way of relearning, the same for every model: samples, order, learning rate and threshold.

    Models are trained by plain stochastic gradient descent on the method's loss and penalty, in evaluation mode (batch-
    norm statistics stand still, dropout is off) and on images as they are evaluated, until the cohort's loss is at
    most `1 + tolerance` times what the original model has (its accuracy at least `1 - tolerance` times). Steps are
    counted from 0: a model that is there already needs none. Golatkar et al. (ECCV 2020; CVPR 2021, section 8.1)
    relearn this way; the number depends on every option and means something only beside that of a retrained model.

    To be made while the data module still has the cohort and the method the original weights; all ranks together.

    Args:
        method: The method, attached to a trainer, at the weights of the original model.
        data: An `ImageDataModule` that still has the cohort, or one with the same loaders.
        cohort: Index of the samples to forget (f,), int64.
        retained: Index of the other training samples, as of `Answers.retain`.
        options: See there.

    Attributes:
        learning_rate: Of every step.
        threshold: Of the cohort's loss or accuracy.
    """

    def __init__(
        self, method: Method, data: Any, cohort: Tensor, retained: Tensor, options: RelearnOptions | None = None
    ) -> None:
        self.method, self.options = method, options or RelearnOptions()
        some, lot = self.options.samples, self.options.seed
        with torch.inference_mode(False):  # images are part of backward passes
            self.samples: RelearningSet = load_relearning_set(method, data, cohort, retained, some, lot)
        given = self.options.learning_rate
        self.learning_rate = self._rate() if given is None else given
        self.threshold = self._threshold(self._value())

    def steps(self, weights: Mapping[str, Tensor] | None) -> int | None:
        """Let a model relearn; the method has its own weights back at the end.

        Args:
            weights: Where it starts, by `method.trained()` name; None: at the method's own.

        Returns:
            Steps until the cohort is back; None if it is not within `max_steps`, or if training diverges.
        """
        with with_weights(self.method, weights):
            if self._reached():
                return 0
            for step, chosen in enumerate(self._order(), 1):
                with evaluation_mode(self.method), exactly(self.method.device, True):
                    descend(self.method, self.samples.rows(chosen), len(chosen), self.learning_rate)
                if self._reached():
                    return step
        return None

    def describe(self) -> dict[str, Any]:
        """Say what a number of steps depends on.

        Returns:
            Plain values: learning rate, threshold and sampling in words, and the options.
        """
        options, number = self.options, len(self.samples.index)
        sign = "<=" if options.measure == "loss" else ">="
        return {
            "learning_rate": self.learning_rate,
            "threshold": f"{options.measure} of the cohort {sign} {self.threshold:.4g}, within {options.tolerance:.0%} "
            "of the original model",
            "sampling": f"{len(self.samples.members)} of {self.samples.cohort} samples of the cohort and "
            f"{number - len(self.samples.members)} retained ones, shuffled anew when all have come, "
            f"{options.batch_size} per step of plain stochastic gradient descent, no augmentation",
            "options": asdict(options),
        }

    def _rate(self) -> float:
        # On minibatches as they come: small ones are steeper than all samples together.
        images = [self.samples.rows(chosen).input for chosen in islice(self._order(), 4)]
        with evaluation_mode(self.method), exactly(self.method.device, True):
            return stable_rate(self.method, images)

    def _order(self) -> Iterator[Tensor]:
        # The indices of every step of all processes together, the same on each.
        draw = torch.Generator().manual_seed(self.options.seed)
        size, left = self.options.batch_size, self.options.max_steps
        while left:
            order = self.samples.index[torch.randperm(len(self.samples.index), generator=draw)]
            for chosen in torch.split(order, size)[:left]:
                left -= 1
                yield chosen

    def _value(self) -> float:
        sums = torch.zeros(2, dtype=torch.float64, device=self.method.device)
        with torch.no_grad(), evaluation_mode(self.method), exactly(self.method.device, False):
            for chosen in torch.split(self.samples.members, self.options.batch_size):
                batch = self.samples.rows(chosen)
                if len(batch.target):
                    logits = self.method(batch.input)
                    right = ((logits.argmax(1) == batch.target) & logits.isfinite().all(1)).sum()
                    found = self.method.loss(logits, batch.target) * len(batch.target), right
                    sums += torch.stack([entry.double() for entry in found])
        loss, accuracy = (current_reducer().sum_(sums) / len(self.samples.members)).tolist()
        return float(loss if self.options.measure == "loss" else accuracy)

    def _threshold(self, original: float) -> float:
        share = self.options.tolerance
        return original * (1 + share) if self.options.measure == "loss" else original * (1 - share)

    def _reached(self) -> bool:
        value = self._value()  # never reached by a loss that is not a number
        return value <= self.threshold if self.options.measure == "loss" else value >= self.threshold
