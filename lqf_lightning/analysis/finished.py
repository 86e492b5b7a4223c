"""What a callback has to know in order to look back at a finished run."""

from lqf_lightning.backbones import Backbone


class LooksBack:
    """Base of callbacks that can do at the end of an evaluation what they else do at the beginning of a training.

    Attributes:
        start: The network before training, where a checkpoint is going to be loaded in its place.
        steps: Optimizer steps that the finished run has taken, and those that its schedule was laid out over; None:
            there is no such run, and evaluations are ordinary.
    """

    start: Backbone | None = None
    steps: tuple[int, int] | None = None
