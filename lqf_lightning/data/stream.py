"""Which training samples a method wants, and in which views."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

UNLABELED = -1  # class position of a sample whose label is unknown or not to be used
ViewsFactory = Callable[..., Any]
_SAMPLES = ("labeled", "all", "both")


@dataclass(frozen=True)
class Stream:
    """What the training loader of a method brings.

    - "labeled": batches of labeled samples.
    - "all": batches of all training samples; the target is -1 where the label is not to be used.
    - "both": a dictionary of a "labeled" and an "unlabeled" batch in every step. An epoch is one pass over all training
      samples without their labels, while the labeled ones repeat in fresh orders.

    Attributes:
        samples: Which samples.
        views: Called with `size`, `crop_fraction` and `weak` (the transform of data.augmentation), gives what turns an
            image into a tuple of images; None: data.augmentation alone. In "both", these are views of the samples
            without label; labeled ones are always augmented by data.augmentation.
        unlabeled_ratio: Samples without label per labeled one in a step of "both".
    """

    samples: Literal["labeled", "all", "both"] = "labeled"
    views: ViewsFactory | None = None
    unlabeled_ratio: int = 1

    def __post_init__(self) -> None:
        """Check the choice.

        Raises:
            ValueError: There is no such stream, or its steps would have no sample without label.
        """
        if self.samples not in _SAMPLES:
            raise ValueError(f"`samples` of a stream must be one of {', '.join(_SAMPLES)}, got {self.samples!r}")
        if self.unlabeled_ratio < 1:
            raise ValueError(
                f"`unlabeled_ratio` must be at least 1, got {self.unlabeled_ratio}. Set method.unlabeled_ratio=5"
            )
