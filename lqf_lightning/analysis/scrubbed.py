"""What a scrub gives back."""

from dataclasses import dataclass, field

from torch import Tensor

from lqf_lightning.linear import Certificate


@dataclass(frozen=True)
class Scrubbed:
    """New weights of a model that is to forget some samples, before noise, and what they have cost.

    Attributes:
        weights: By the names of `method.trained()`, intercept or bias included.
        certificate: How far they are from the optimum on the retained samples; None where nothing is certified. Its
            distance is that of the penalized weights, in the norm of the metric. Its relative gradient is not a number
            where nobody asked for it.
        intercept_bound: Upper bound of `|b - b*|` where the bias of the head is free of penalty; 0 where there is none,
            None where it has not been computed.
        name: Of the scrub: "newton", "kernel", "fisher", "ntk", "finetune", "gradient_ascent", "random_labels" or
            "hide_class".
        steps: Iterations or optimizer steps.
        passes: Work in passes over the retained samples: 1 is that of one training step per sample, 5 evaluations of
            the convolutions.
        seconds: Wall time.
        curve: After every step, "passes" and what is known by then: "relative_gradient" and "distance_bound" of a
            linear model, "loss" of others.
        buffers: Statistics of batch normalization that belong to the weights, by the names of the network; None: those
            that were there.
    """

    weights: dict[str, Tensor]
    certificate: Certificate | None
    intercept_bound: float | None
    name: str
    steps: int
    passes: float
    seconds: float
    curve: list[dict[str, float]] = field(default_factory=list)
    buffers: dict[str, Tensor] | None = None
